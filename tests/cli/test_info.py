import json

from safetensors.torch import load_file

from shadowtune.cli.main import main


def facts(path, tmp_path):
    assert main(["info", str(path), "--json", str(tmp_path / "i.json")]) == 0
    return json.loads((tmp_path / "i.json").read_text())["rows"][0]


def test_a_run_tells_its_settings_and_sizes(shadow_run, base, tmp_path):
    told = facts(shadow_run, tmp_path)
    assert (told["method"], told["finished"], told["rank"], told["base"]) == ("shadow", True, 4, str(base))
    assert told["tensors_total"] == sum(
        t.numel() for t in load_file(shadow_run / "model" / "model.safetensors").values()
    )
    assert told["tensors_total"] == sum(count for name, count in told.items() if name.startswith("tensors_shadow."))


def test_a_saved_shadow_tells_the_same(shadow_run, tmp_path):
    run, saved = facts(shadow_run, tmp_path), facts(shadow_run / "model", tmp_path)
    assert all(run[name] == value for name, value in saved.items())


def test_a_lora_run_tells_what_it_cost(lora_run, tmp_path):
    told = facts(lora_run, tmp_path)
    assert (told["method"], told["finished"]) == ("lora", True)
    assert told["trainable_parameters"] > 0


def test_damage_is_named(shadow_run, tmp_path, capsys):
    import shutil

    shutil.copytree(shadow_run / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["info", str(tmp_path / "model")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
