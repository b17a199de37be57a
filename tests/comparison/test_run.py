"""Whole comparisons, in this process."""

import json
import shutil

import pytest

from shadowtune.comparison import execution
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import compare as compare_all
from shadowtune.comparison.run import failures
from shadowtune.comparison.run import rows_done as rows_known
from shadowtune.errors import CheckpointError, DataError, ShadowtuneError
from tests.support.commands import ROWS, write_rows
from tests.support.comparisons import SHADOW, LocalWorker, compare_config

SWEEP = {"grid": {"optimizer.learning_rate": [1e-6, 3e-2]}, "settings": {"max_steps": 8}, "select": "loss"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", LocalWorker)


def compare(plan, report=lambda line: None):
    return compare_all(plan, report).rows


def rows_done(plan):
    return rows_known(plan).rows


def results(path):
    return [json.loads(line) for line in (path / "out" / "results.jsonl").read_text().splitlines()]


def measured(rows):
    """What a run found, times and places left out."""
    return [
        (row["method"], row["seed"], each["mode"], each["loss"], each["scores"])
        for row in rows
        for each in row["evaluations"]
    ]


def test_every_run_leaves_a_row_with_all_that_made_it(tmp_path):
    said = []
    rows = compare(Plan.of(compare_config(tmp_path, seeds=[1, 2])), said.append)
    assert results(tmp_path) == rows
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("base", 1), ("lora", 1), ("shadow", 1), ("lora", 2), ("shadow", 2),
    ]  # fmt: skip
    shadow = rows[2]
    assert shadow["error"] is None
    assert shadow["config"]["shadow"]["rank"] == 4
    assert shadow["training"]["steps"] == 4
    assert shadow["provenance"]["versions"]["torch"]
    assert [each["mode"] for each in shadow["evaluations"]] == ["attached", "detached"]
    assert [len(each["scores"]) for each in shadow["evaluations"]] == [8, 8]
    assert len({each["loss"] for row in rows for each in row["evaluations"]}) == 7
    assert said[-1].startswith("[5/5] words/shadow/seed-2-")
    assert not list((tmp_path / "out" / "runs").glob("*/*/*/checkpoints"))


def test_the_same_settings_give_the_same_numbers(tmp_path):
    first = compare(Plan.of(compare_config(tmp_path)))
    second = compare(Plan.of(compare_config(tmp_path, output=str(tmp_path / "again"))))
    assert measured(first) == measured(second)


def test_nothing_is_done_twice_and_what_changes_is_done_anew(tmp_path):
    compare(Plan.of(compare_config(tmp_path)))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*.json")}
    said = []
    rows = compare(Plan.of(compare_config(tmp_path)), said.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*.json")} == files
    assert said == ["3 of 3 runs are done already"]
    methods = {"base": None, "lora": {"lora": {"rank": 3}}, "shadow": {"shadow": SHADOW}}
    changed = compare(Plan.of(compare_config(tmp_path, methods=methods)), said.append)
    assert len([line for line in said if line.startswith("[")]) == 1
    assert changed[0] == rows[0]
    assert changed[1]["config"]["lora"]["rank"] == 3
    assert changed[2] == rows[2]


def test_the_file_of_results_is_enough_to_go_on_from(tmp_path):
    rows, out = compare(Plan.of(compare_config(tmp_path))), tmp_path / "out"
    shutil.rmtree(out / "runs")
    assert rows_done(Plan.of(compare_config(tmp_path))) == rows
    shutil.rmtree(out / "runs")
    said = []
    more = compare(Plan.of(compare_config(tmp_path, seeds=[1, 2])), said.append)
    assert said[0] == "3 of 5 runs are done already"
    assert more[:3] == rows
    assert results(tmp_path) == more


def test_a_damaged_file_of_results_is_named_and_kept(tmp_path):
    compare(Plan.of(compare_config(tmp_path)))
    file = tmp_path / "out" / "results.jsonl"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(CheckpointError, match=r"results\.jsonl is damaged .*; delete it"):
        compare(Plan.of(compare_config(tmp_path)))
    assert file.exists()


def test_other_test_rows_are_answered_without_training_again(tmp_path):
    compare(Plan.of(compare_config(tmp_path)))
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")}
    data = str(tmp_path / "words")
    tasks = {"words": {"data": {"train": data, "validation": data}, "test_limit": 3}}
    rows = compare(Plan.of(compare_config(tmp_path, tasks=tasks)))
    assert {each["rows"] for row in rows for each in row["evaluations"]} == {3}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("model/*")} == trained


def test_the_sweep_takes_what_was_best_on_validation_rows(tmp_path):
    compare_config(tmp_path)
    write_rows(tmp_path / "words" / "test.jsonl", [{**row, "completion": "zz"} for row in ROWS])
    rows = compare(Plan.of(compare_config(tmp_path, sweep=SWEEP)))
    trials = [row for row in rows if row["stage"] == "trial"]
    assert len(trials) == 4
    for method in ("lora", "shadow"):
        losses = {
            row["setting"]["optimizer.learning_rate"]: row["evaluations"][0]["loss"]
            for row in trials
            if row["method"] == method
        }
        assert losses[3e-2] < losses[1e-6]
        (final,) = [row for row in rows if row["stage"] == "final" and row["method"] == method]
        assert final["config"]["optimizer"]["learning_rate"] == 3e-2
        assert final["training"]["steps"] == 4


def test_the_sweep_does_not_read_test_rows(tmp_path):
    compare_config(tmp_path)
    (tmp_path / "words" / "test.jsonl").write_text("no row at all\n")
    rows = compare(Plan.of(compare_config(tmp_path, sweep=SWEEP)))
    assert all(row["error"] is None for row in rows if row["stage"] == "trial")
    finals = [row for row in rows if row["stage"] == "final"]
    assert len(finals) == 3
    assert all("test.jsonl" in row["error"] for row in finals)


def test_a_method_whose_every_trial_failed_is_named_and_stops_no_other(tmp_path, monkeypatch):
    call = LocalWorker.call

    def call_or_fail(worker, function, *arguments):
        if "lora" in worker.name:
            raise ShadowtuneError("no room for it")
        call(worker, function, *arguments)

    monkeypatch.setattr(LocalWorker, "call", call_or_fail)
    rows = compare(Plan.of(compare_config(tmp_path, sweep=SWEEP)))
    assert [row["method"] for row in rows if row["stage"] == "final"] == ["base", "shadow"]
    assert [(row["method"], row["stage"]) for row in failures(rows)] == [("lora", "trial")] * 2


def test_missing_training_rows_are_said_before_any_run(tmp_path):
    config = compare_config(tmp_path)
    (tmp_path / "words" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"task words: .*; only=\[...\] names the tasks to do"):
        compare(Plan.of(config))
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_kept_stops_no_other_and_is_tried_again(tmp_path, monkeypatch):
    call = LocalWorker.call

    def call_or_fail(worker, function, *arguments):
        if "lora" in worker.name:
            raise ShadowtuneError("no room for it")
        call(worker, function, *arguments)

    monkeypatch.setattr(LocalWorker, "call", call_or_fail)
    said = []
    rows = compare(Plan.of(compare_config(tmp_path)), said.append)
    assert [row["error"] for row in rows] == [None, "no room for it", None]
    assert "failed: no room for it" in said[1]
    monkeypatch.undo()
    monkeypatch.setattr(execution, "WorkerProcess", LocalWorker)
    assert [row["error"] for row in compare(Plan.of(compare_config(tmp_path)))] == [None, None, None]


def test_a_run_that_was_interrupted_in_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    from shadowtune.errors import TrainingError
    from shadowtune.training.trainer import ShadowTrainer

    methods = {"shadow": {"shadow": {**SHADOW, "dropout": 0.3}, "save_steps": 1}}
    whole = compare(Plan.of(compare_config(tmp_path, methods=methods, output=str(tmp_path / "whole"))))
    step, taken = ShadowTrainer.training_step, []

    def step_or_stop(trainer, *args, **kwargs):
        taken.append(trainer.state.global_step)
        if taken == [0, 1, 2]:
            raise TrainingError("stopped")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(ShadowTrainer, "training_step", step_or_stop)
    (stopped,) = compare(Plan.of(compare_config(tmp_path, methods=methods)))
    assert stopped["error"] == "stopped"
    rows = compare(Plan.of(compare_config(tmp_path, methods=methods)))
    assert taken == [0, 1, 2, 2, 3]
    assert measured(rows) == measured(whole)


def test_a_model_trained_on_one_task_answers_the_rows_of_another(tmp_path):
    compare_config(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "test"):
        write_rows(
            other / f"{split}.jsonl",
            [{"question": "red", "completion": "sea"}, {"question": "sun", "completion": "ice"}],
        )
    tasks = {
        "words": {"data": {"train": str(tmp_path / "words")}, "test_tasks": ["words", "other"]},
        "other": {"data": {"train": str(other), "template": "say {question}"}},
    }
    rows = compare(Plan.of(compare_config(tmp_path, tasks=tasks, methods={"lora": {"lora": {"rank": 2}}})))
    assert [(row["task"], each["task"], each["rows"]) for row in rows for each in row["evaluations"]] == [
        ("words", "words", 8), ("words", "other", 2), ("other", "other", 2),
    ]  # fmt: skip


def test_adapters_of_peft_are_compared_and_its_shadow_is_detached(tmp_path):
    methods = {
        "ia3": {"method": "peft", "peft": {"peft_type": "IA3"}},
        "peft-shadow": {"method": "peft", "peft": {"peft_type": "SHADOW", "r": 4}},
    }
    rows = compare(Plan.of(compare_config(tmp_path, methods=methods)))
    assert [row["error"] for row in rows] == [None, None]
    assert [[each["mode"] for each in row["evaluations"]] for row in rows] == [["attached"], ["attached", "detached"]]
    losses = [each["loss"] for row in rows for each in row["evaluations"]]
    assert len(set(losses)) == 3
