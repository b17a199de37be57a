import json

import pytest

from shadowtune.cli.main import main
from tests.support.commands import ROWS, write_rows


def rows_of(file):
    return json.loads(file.read_text())["rows"]


def test_all_modes_of_a_shadow_run_are_measured(shadow_run, data, tmp_path):
    result, answers = tmp_path / "r.json", tmp_path / "answers.jsonl"
    command = ["evaluate", str(shadow_run), "--data", str(data), "--quiet", "--json", str(result)]
    assert main([*command, "--predictions", str(answers)]) == 0
    rows = rows_of(result)
    assert [row["mode"] for row in rows] == ["attached", "detached", "base"]
    assert all(row["rows"] == len(ROWS) and 0 <= row["accuracy"] <= 1 for row in rows)
    assert len({row["loss"] for row in rows}) == 3
    assert rows[0]["loss"] < rows[2]["loss"]  # four steps of training helped
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == len(ROWS)
    assert set(lines[0]) == {"row", "attached", "detached", "base"}


def test_one_mode_and_a_limit(shadow_run, data, tmp_path):
    result = tmp_path / "r.json"
    command = ["evaluate", str(shadow_run), "--mode", "detached", "--data", str(data), "--limit", "3", "--quiet"]
    assert main([*command, "--json", str(result)]) == 0
    (row,) = rows_of(result)
    assert (row["mode"], row["rows"]) == ("detached", 3)


def test_base_mode_of_shadow_and_lora_is_the_same_model(shadow_run, lora_run, data, tmp_path):
    losses = []
    for run in (shadow_run, lora_run):
        command = ["evaluate", str(run), "--mode", "base", "--data", str(data), "--quiet"]
        assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
        losses.append(rows_of(tmp_path / "r.json")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "was trained on; pass --data"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--limit", "0"], "limit"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, said, shadow_run, data, capsys):
    arguments = arguments if not arguments or "--data" in arguments else ["--data", str(data), *arguments]
    assert main(["evaluate", str(shadow_run), "--quiet", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_lora_has_no_detached_mode(lora_run, data, capsys):
    assert main(["evaluate", str(lora_run), "--mode", "detached", "--data", str(data), "--quiet"]) == 2
    assert "no mode 'detached'" in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_unfinished_run_is_named(shadow_run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((shadow_run / "config.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_classification_run_is_evaluated_by_its_classes(base, tmp_path):
    from tests.support.commands import write_config

    data = write_rows(tmp_path / "rows.jsonl", [{"text": word, "label": len(word) % 3} for word in ("a", "at", "the")])
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", "task: classification\n")
    assert main(["train", str(config), "--quiet"]) == 0
    command = ["evaluate", str(tmp_path / "run"), "--data", str(data), "--quiet"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    rows = rows_of(tmp_path / "r.json")
    assert [row["mode"] for row in rows] == ["attached", "detached", "base"]
    assert all(row["rows"] == 3 for row in rows)


def test_a_trained_run_is_measured_beside_a_quantized_base(shadow_run, data, tmp_path):
    pytest.importorskip("torchao")
    losses = {}
    for quantization in ("none", "int8"):
        command = ["evaluate", str(shadow_run), "--mode", "attached", "--data", str(data), "--quiet"]
        assert main([*command, "--quantization", quantization, "--json", str(tmp_path / "r.json")]) == 0
        losses[quantization] = rows_of(tmp_path / "r.json")[0]["loss"]
    assert losses["int8"] != losses["none"]
    assert losses["int8"] == pytest.approx(losses["none"], rel=0.05)


def test_a_base_that_cannot_be_quantized_so_is_one_line(shadow_run, data, capsys):
    pytest.importorskip("torchao")
    assert main(["evaluate", str(shadow_run), "--data", str(data), "--quiet", "--quantization", "int4"]) == 2
    assert "cannot load the" in capsys.readouterr().err.splitlines()[-1]
