import argparse
import json

import pytest
import yaml

from shadowtune.cli.main import main
from tests.support.commands import write_config, write_rows


def test_train_leaves_a_run_directory_and_one_json_object(base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "unused")
    out, result = tmp_path / "run", tmp_path / "result.json"
    assert main(["train", str(config), f"output={out}", "max_steps=3", "--quiet", "--json", str(result)]) == 0
    document = json.loads(result.read_text())
    assert (document["schema"], document["command"]) == (1, "train")
    assert document["provenance"]["versions"]["torch"]
    (row,) = document["rows"]
    assert row["run"] == str(out)
    assert row["steps"] == 3
    assert row["trainable_parameters"] > 0
    assert row["train_seconds"] > 0
    assert {path.name for path in out.iterdir()} >= {"config.yaml", "environment.json", "metrics.jsonl", "model"}
    assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == 3
    shown = capsys.readouterr()
    assert "Trained" in shown.out
    assert "trainable" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shadow.rnak=4"], "unknown key shadow.rnak (did you mean rank?)"),
        (["shadow.rank=0"], "rank must be at least 1, got 0"),
        (["shadow.dropout=1.5"], "dropout must be at least 0 and below 1, got 1.5"),
        (["shadow.alpha=-1"], "alpha"),
        (["shadow.alpha=.nan"], "alpha"),
        (["method=lorra"], "did you mean lora"),
        (["batch_size=two"], "batch_size must be int"),
        (["epochs"], "key=value"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["model=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.max_length=3", "data.overlong=error"], "data.max_length"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, said, base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run")
    assert main(["train", str(config), "--quiet", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("shadowtune: error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"question": "a"}], "line 1"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2"),
        ([{"prompt": 3.5, "completion": None}], "completion"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(rows, said, base, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run")
    assert main(["train", str(config), "--quiet"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "model: x\nmodel: y\n"])
def test_a_file_that_is_no_config_is_one_line(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "c.yaml") in line


def test_a_run_is_not_written_over_but_may_be(base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", "method: full\n")
    assert main(["train", str(config), "--quiet"]) == 0
    assert main(["train", str(config), "--quiet"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", str(config), "--quiet", "--overwrite"]) == 0


def test_json_that_cannot_be_written_is_said_before_the_work(base, data, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run")
    assert main(["train", str(config), "--json", str(tmp_path / "no" / "folder.json")]) == 2
    assert "--json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FEW = ["shadow.rank=4", "shadow_epochs=0.5", "max_steps=2", "batch_size=4", "logging_steps=1", "draft_vocabulary="]


@pytest.fixture(scope="module")
def recipe_run(base, data, tmp_path_factory):
    """A run by the recipe inside the package, without a settings file."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    command = ["train", "--model", str(base), "--data", str(data), "--output", str(out), "--quiet"]
    assert main([*command, *FEW]) == 0
    return out


def test_a_model_and_data_are_enough_for_a_run(recipe_run, base, data):
    settings = yaml.safe_load((recipe_run / "config.yaml").read_text())
    assert (settings["model"], settings["data"]["train"], settings["preset"]) == (str(base), str(data), "recommended")
    assert (settings["shadow"]["variant"], settings["shadow"]["rank"], settings["max_steps"]) == ("stateless", 4, 2)
    assert settings["data"]["validation"] == "hold_out"
    assert (recipe_run / "summary.json").is_file()


def test_a_run_is_resumed_by_its_directory_alone(recipe_run, tmp_path, capsys, monkeypatch):
    assert main(["train", str(recipe_run), "--quiet"]) == 2
    assert "--resume" in capsys.readouterr().err
    (recipe_run / "summary.json").unlink()
    monkeypatch.chdir(recipe_run.parent)
    assert main(["train", "run", "--resume", "--quiet", "--json", str(tmp_path / "r.json")]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (row["run"], row["steps"]) == ("run", 2)
    assert main(["train", str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path} is not a run directory" in capsys.readouterr().err


def test_init_writes_the_settings_of_a_run_without_a_file(tmp_path, monkeypatch, capsys):
    from shadowtune.cli.train import read_settings
    from shadowtune.config.loading import load_config
    from shadowtune.config.training import TrainConfig

    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", 'a "b": c', "--data", "data/my rows.v2.jsonl"]) == 0
    arguments = argparse.Namespace(settings=[], model='a "b": c', data="data/my rows.v2.jsonl", output=None)
    config = load_config(TrainConfig, "train.yaml", [])
    assert config == read_settings(arguments)
    assert config.output == "runs/my rows"
    text = (tmp_path / "train.yaml").read_text()
    assert "shadowtune train train.yaml" in text and "# the one setting to tune" in text
    assert main(["init"]) == 2
    assert "train.yaml exists already" in capsys.readouterr().err
    assert main(["init", "--out", "other.yaml"]) == 0
    assert load_config(TrainConfig, "other.yaml", []) == load_config(TrainConfig, "recommended", [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a settings file, a run to resume, or data"),
        (["--model", "m"], "name a settings file, a run to resume, or data"),
        (["epochs=2"], "name a settings file, a run to resume, or data"),
        (["--data", "x.jsonl", "learning_rate=1"], "unknown key learning_rate (did you mean optimizer.learning_rate?)"),
        (["--data", "x.jsonl", "rank=1"], "unknown key rank (did you mean shadow.rank or lora.rank?)"),
        (["nowhere.yaml", "--data", "x.jsonl"], "cannot read nowhere.yaml"),
    ],
)
def test_what_a_run_without_a_file_lacks_is_one_line(arguments, said, capsys):
    assert main(["train", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("data/tickets.csv.gz", "runs/tickets"),
        ("hub:org/name:train", "runs/name"),
        ("my rows.v2.jsonl", "runs/my rows"),
        ("gsm8k", "runs/gsm8k"),
        ("../..", "runs/train"),
    ],
)
def test_the_run_is_named_after_its_data(data, output):
    from shadowtune.cli.train import default_output

    assert default_output(data) == output
