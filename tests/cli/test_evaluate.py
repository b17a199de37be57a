import json
from pathlib import Path

import pytest

from shadowtune.cli.main import main
from tests.support.commands import ROWS, write_config, write_rows
from tests.support.runs import model_directory
from tests.support.tasks import write_task_data


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
    data = write_rows(tmp_path / "rows.jsonl", [{"text": word, "label": len(word) % 3} for word in ("a", "at", "the")])
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", "task: classification\n")
    assert main(["train", str(config), "--quiet"]) == 0
    command = ["evaluate", str(tmp_path / "run"), "--data", str(data), "--quiet"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    rows = rows_of(tmp_path / "r.json")
    assert [row["mode"] for row in rows] == ["attached", "detached", "base"]
    assert all(row["rows"] == 3 for row in rows)


def test_a_classification_run_on_a_base_without_a_pad_token_works_in_every_mode_and_generates_nothing(tmp_path, capsys):
    base = Path(model_directory(tmp_path / "base", pad_token_id=None))
    data = write_rows(tmp_path / "rows.jsonl", [{"text": word, "label": len(word) % 3} for word in ("a", "at", "the")])
    config = write_config(tmp_path / "c.yaml", base, data, tmp_path / "run", "task: classification\n")
    assert main(["train", str(config), "--quiet"]) == 0
    command = ["evaluate", str(tmp_path / "run"), "--data", str(data), "--quiet"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    assert [row["mode"] for row in rows_of(tmp_path / "r.json")] == ["attached", "detached", "base"]
    assert main(["detach", str(tmp_path / "run"), "--out", str(tmp_path / "small")]) == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["pad_token_id"] == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "the"]) == 2
    assert "is a classification run: it predicts classes" in capsys.readouterr().err.splitlines()[-1]
    assert main(["lm-eval", str(tmp_path / "run"), "--tasks", "x"]) == 2
    assert "is a classification run" in capsys.readouterr().err.splitlines()[-1]


TASK = """name: teams
rows: {source: SOURCE, test: null}
prompt: "Ticket: {text}\\nTeam:"
completion: "{label_name}"
label_field: team
labels: [help_desk, sales]
metric: label
max_new_tokens: 8
chat_template: false
"""


@pytest.fixture
def own_task(tmp_path):
    """A task of a user's own: 40 rows of JSONL and nine lines of YAML."""
    rows = [{"text": f"ticket {number}", "team": "sales" if number % 2 else "help_desk"} for number in range(40)]
    (tmp_path / "teams.yaml").write_text(TASK.replace("SOURCE", str(write_rows(tmp_path / "tickets.jsonl", rows))))
    return tmp_path / "teams.yaml"


def train_on(task, base, tmp_path, *settings):
    config = write_config(tmp_path / "c.yaml", base, "null", tmp_path / "run", "group_by_length: true\n")
    assert main(["train", str(config), "--quiet", f"data.task={task}", *settings]) == 0
    return str(tmp_path / "run")


@pytest.mark.parametrize("kind", ["causal_lm", "classification"])
def test_a_task_of_ones_own_is_a_jsonl_and_ten_lines(kind, own_task, base, tmp_path):
    run = train_on(own_task, base, tmp_path, f"task={kind}", "data.validation=task")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in losses)
    for split, count in (("test", 4), ("validation", 4), ("train", 32)):
        command = ["evaluate", run, "--mode", "attached", "--split", split, "--quiet"]
        assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
        (row,) = rows_of(tmp_path / "r.json")
        assert (row["rows"], row["task"]) == (count, "teams version 1")
    assert main(["evaluate", run, "--limit", "3", "--quiet", "--json", str(tmp_path / "r.json")]) == 0
    assert [row["rows"] for row in rows_of(tmp_path / "r.json")] == [3, 3, 3]


def test_a_run_is_measured_on_tasks_of_a_directory_by_their_metrics(own_task, base, tmp_path):
    run = train_on(own_task, base, tmp_path)
    for name in ("squad_v2", "gsm8k"):
        write_task_data(tmp_path / "data", name, count=3)
    command = ["evaluate", run, "--mode", "base", "--data", str(tmp_path / "data"), "--max-new-tokens", "3", "--quiet"]
    columns = {}
    for name in ("squad_v2", "gsm8k"):
        assert main([*command, "--task", name, "--json", str(tmp_path / "r.json")]) == 0
        (columns[name],) = rows_of(tmp_path / "r.json")
        assert (columns[name]["rows"], columns[name]["task"]) == (3, f"{name} version 1")
    assert columns["squad_v2"].keys() - columns["gsm8k"].keys() == {"f1"}
    assert not {"scores", "predictions", "other_scores"} & columns["squad_v2"].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "gsm8"], "no task 'gsm8' (did you mean gsm8k?)"),
        (["--task", "gsm8k", "--data", "nowhere"], "nowhere"),
        (["--task", "amazon", "--data", "somewhere"], "not from a directory of data sets"),
        (["--data", "somewhere"], "task teams has its rows from"),
        (["--split", "dev"], "no part 'dev'"),
    ],
)
def test_what_a_task_cannot_give_is_one_line(arguments, said, own_task, base, tmp_path, capsys):
    run = train_on(own_task, base, tmp_path)
    assert main(["evaluate", run, "--quiet", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


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


def test_speculation_changes_no_answer(shadow_run, data, tmp_path):
    said = []
    for options in ([], ["--speculate"], ["--speculate", "3", "--batch-size", "3"]):
        command = ["evaluate", str(shadow_run), "--data", str(data), "--mode", "attached", "--quiet", *options]
        assert main([*command, "--predictions", str(tmp_path / "p.jsonl")]) == 0
        said.append((tmp_path / "p.jsonl").read_text())
    assert said[0] == said[1] == said[2]
