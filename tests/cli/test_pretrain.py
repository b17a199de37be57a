import json

import pytest
import yaml

from shadowtune.cli.main import main
from tests.support.commands import write_config, write_rows

TEXTS = [{"text": f"the {word} in the hat"} for word in ("cat", "hat", "tin", "hen", "ant", "tea")]


@pytest.fixture
def config(base, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", TEXTS)
    file = write_config(tmp_path / "c.yaml", base, texts, tmp_path / "run")
    file.write_text(
        file.read_text().replace(f"train: {texts}", f"train: {texts}\n  validation: {texts}\n  block_size: 8")
    )
    return file


def last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_pretrain_leaves_a_run_that_knows_its_stage_and_from_which_a_task_starts(config, base, data, tmp_path, capsys):
    result, run = tmp_path / "result.json", tmp_path / "run"
    assert main(["pretrain", str(config), "stage=task", "--quiet", "--json", str(result)]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["stage"] == "pretrain"
    document = json.loads(result.read_text())
    assert document["command"] == "pretrain"
    assert (
        document["rows"][0]["detached_perplexity"]
        == json.loads((run / "summary.json").read_text())["detached_perplexity"]
    )
    shown = capsys.readouterr()
    assert f"Pretrained: {run}" in shown.out.replace("\n", "")
    assert "perplexity" in shown.out
    assert "data: 6 documents, " in shown.err
    assert main(["pretrain", str(config), "--quiet", "--resume"]) == 0

    assert main(["info", str(run)]) == 0
    assert main(["detach", str(run), "--out", str(tmp_path / "small")]) == 0
    task = write_config(tmp_path / "task.yaml", base, data, tmp_path / "task")
    assert main(["train", str(task), f"shadow.init_from={run}/model", "--quiet"]) == 0
    assert "perplexity" not in (tmp_path / "task" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=lora"], "stage=pretrain"),
        (["task=classification", "data.block_size="], "task is classification"),
        (["projection_steps=2"], "its hidden_size is the base's"),
        (["data.block_size=1"], "block_size must be at least 2"),
        (["data.template='{text}'"], "block_size=8 joins plain texts"),
        (["data.text_field=story"], "line 1: no field 'story'"),
        (["data.train=nowhere.txt"], "nowhere.txt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, said, config, tmp_path, capsys):
    assert main(["pretrain", str(config), "--quiet", *arguments]) == 2
    line = last_line(capsys)
    assert line.startswith("shadowtune: error: ")
    assert said in line
    assert not (tmp_path / "run" / "model").exists()


def test_blocks_beyond_the_positions_of_the_model_are_refused(config, tmp_path, capsys):
    write_rows(tmp_path / "texts.jsonl", [{"text": "the cat " * 100}])
    assert main(["pretrain", str(config), "data.block_size=1000", "--quiet"]) == 2
    assert "1 of 1 rows (1) are longer than the model's 128 positions" in last_line(capsys)


def test_projections_first_is_no_setting_of_a_task(config, capsys):
    assert main(["train", str(config), "projection_steps=2", "--quiet"]) == 2
    assert "run shadowtune pretrain" in last_line(capsys)


def test_a_pretraining_needs_its_settings(capsys):
    assert main(["pretrain", "--data", "corpus.txt"]) == 2
    assert "shadowtune pretrain configs/pretrain.yaml data.train=FILE" in capsys.readouterr().err


def test_a_pretraining_is_not_resumed_as_a_task(config, tmp_path, capsys):
    assert main(["pretrain", str(config), "--quiet"]) == 0
    assert main(["train", str(config), "--quiet", "--resume"]) == 2
    assert "stage changed" in last_line(capsys)
