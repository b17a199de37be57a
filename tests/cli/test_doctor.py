import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowtune.cli.main import main
from shadowtune.model.checkpoint import write_tensors


def doctor(path, tmp_path, *more):
    code = main(["doctor", str(path), *more, "--json", str(tmp_path / "d.json")])
    document = json.loads((tmp_path / "d.json").read_text())
    return code, {row["check"]: row for row in document["rows"]}, document


@pytest.fixture
def copy(shadow_run, tmp_path):
    return shutil.copytree(shadow_run, tmp_path / "copy")


def statuses(found):
    return {check: row["status"] for check, row in found.items()}


def test_a_healthy_run_has_no_problem_and_shows_its_masks(shadow_run, tmp_path, capsys):
    code, found, document = doctor(shadow_run, tmp_path)
    assert code == 0
    assert "problem" not in statuses(found).values(), found
    for check in ("versions", "base", "tied weights", "finite weights", "masks", "learned ends", "serving", "detached"):
        assert check in found
    sample = document["samples"][0]
    assert [learned for _, learned in sample] == sorted(learned for _, learned in sample)  # the prompt, then the answer
    assert any(learned for _, learned in sample)
    assert "example 1" in capsys.readouterr().out


def test_a_saved_shadow_is_checked_without_its_data(shadow_run, tmp_path):
    code, found, _ = doctor(shadow_run / "model", tmp_path)
    assert code == 0
    assert found["masks"]["status"] == "warning"
    assert found["serving"]["status"] == "ok"


def test_other_weights_of_the_base_are_a_problem(copy, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name] = weights[name] + 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = (copy / "config.yaml").read_text().replace(str(base), str(other))
    (copy / "config.yaml").write_text(config)
    code, found, _ = doctor(copy, tmp_path)
    assert code == 1
    assert found["base"]["status"] == "problem"


def test_an_end_token_that_generation_does_not_know_is_a_problem(copy, tmp_path):
    file = copy / "model" / "prompt_format.json"
    form = json.loads(file.read_text())
    file.write_text(json.dumps({**form, "ends": [5]}))
    code, found, _ = doctor(copy, tmp_path)
    assert code == 1
    assert (found["ends"]["status"], found["learned ends"]["status"]) == ("problem", "problem")


def test_weights_that_are_not_finite_are_a_problem(copy, tmp_path):
    tensors = load_file(copy / "model" / "model.safetensors")
    name = next(name for name in tensors if "injection_downs" in name)
    tensors[name][0, 0, 0] = torch.nan
    (copy / "model" / "model.safetensors").unlink()
    write_tensors(copy / "model", tensors)
    code, found, _ = doctor(copy, tmp_path)
    assert code == 1
    assert found["finite weights"]["status"] == "problem"


def test_an_export_beside_the_run_is_compared_and_one_of_another_run_is_not_equal(copy, lora_run, tmp_path, capsys):
    assert main(["detach", str(copy), "--out", str(tmp_path / "copy-plain")]) == 0
    code, found, _ = doctor(copy, tmp_path)
    assert code == 0
    assert found["export copy-plain"]["status"] == "ok"
    weights = load_file(tmp_path / "copy-plain" / "model.safetensors")
    shuffled = {name: tensor.flip(0).contiguous() if "embed" in name else tensor for name, tensor in weights.items()}
    (tmp_path / "copy-plain" / "model.safetensors").unlink()
    write_tensors(tmp_path / "copy-plain", shuffled)
    _, found, _ = doctor(copy, tmp_path)
    assert found["export copy-plain"]["status"] != "ok"


@pytest.mark.parametrize(("path", "said"), [("nowhere", "nowhere"), ("lora", "is a lora run")])
def test_what_cannot_be_checked_is_one_line(path, said, lora_run, capsys):
    assert main(["doctor", str(lora_run) if path == "lora" else path]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
