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
