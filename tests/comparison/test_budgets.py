"""Equal time and equal memory, on invented costs."""

import pytest

from shadowtune.comparison import execution
from shadowtune.comparison.analysis import Analysis
from shadowtune.comparison.budgets import merged, scaled
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.report import conclusions
from shadowtune.comparison.run import compare, rows_done
from shadowtune.comparison.tables import tables_of
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.errors import ConfigError
from tests.support.comparisons import SHADOW, InventedWorker, compare_config


class Worker(InventedWorker):
    """Costs of this file's tests."""


@pytest.fixture(autouse=True)
def invented(monkeypatch):
    monkeypatch.setattr(execution, "WorkerProcess", Worker)
    monkeypatch.setattr(Worker, "seconds_per_step", {"lora": 1.0, "shadow": 2.0, "dora": 1.01})
    monkeypatch.setattr(Worker, "fit_seconds", {})
    monkeypatch.setattr(Worker, "memory", {})
    monkeypatch.setattr(Worker, "failing", set())
    monkeypatch.setattr(Worker, "skill", staticmethod(lambda method, rate: 0.5))
    Worker.calls.clear()


METHODS = {"base": None, "lora": {"lora": {"rank": 2}}, "dora": None, "shadow": {"shadow": SHADOW}}
COMMON = {"max_steps": None, "epochs": 1.0, "batch_size": 4}


def run(path, report=lambda line: None, **changes):
    settings = compare_config(path).common
    config = compare_config(path, **{"methods": METHODS, "common": {**settings, **COMMON}, **changes})
    return config, compare(Plan.of(config), report)


def find(results, column, method, seed=1):
    (row,) = [
        row
        for row in results.rows
        if (row["method"], row["seed"]) == (method, seed) and column in row["columns"] and row["training"]
    ]
    return row


def test_every_method_gets_the_seconds_of_the_one_named(tmp_path):
    _, results = run(tmp_path, budget={"time": "lora"}, seeds=[1, 2])
    shadow = find(results, "time", "shadow")
    assert shadow["config"]["epochs"] == 0.5
    assert shadow["training"]["train_seconds"] == pytest.approx(100)
    assert find(results, "time", "shadow", 2)["config"]["epochs"] == 0.5
    assert shadow["size"].endswith("epochs 0.5")


def test_what_is_equal_already_is_not_trained_again(tmp_path):
    _, results = run(tmp_path, budget={"time": "lora"})
    assert find(results, "time", "lora")["columns"] == ["parameters", "time"]
    assert find(results, "time", "dora")["columns"] == ["parameters", "time"]
    assert len(Worker.calls) == 5


def test_all_stages_are_scaled_and_what_a_fit_takes_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "fit_seconds", {"shadow": 20.0})
    shadow = {"shadow": SHADOW, "shadow_epochs": 4.0, "fit_logit_interpolation": True}
    _, results = run(tmp_path, methods={"lora": None, "shadow": shadow}, budget={"time": "lora"})
    row = find(results, "time", "shadow")
    assert (row["config"]["epochs"], row["config"]["shadow_epochs"]) == (0.4, 1.6)  # (100 - 20) / 200
    assert row["training"]["train_seconds"] == pytest.approx(100)


def test_a_time_in_which_no_step_fits_is_said_in_a_line_and_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "fit_seconds", {"shadow": 150.0})
    said = []
    config, results = run(tmp_path, said.append, budget={"time": "lora"})
    (unmet,) = results.unmet
    assert (unmet.column, unmet.task, unmet.method) == ("time", "words", "shadow")
    assert "fits into 100.0 s, the time of lora" in unmet.why
    assert [line for line in said if "not compared at equal time: words, shadow" in line]
    analysis = Analysis(config, results.rows)
    assert any("Not compared: shadow at equal wall time on words (" in line for line in conclusions(analysis, results))
    (row,) = tables_of(analysis, results)["Not compared"]
    assert (row["method"], row["where"]) == ("shadow", "equal wall time")


def test_a_method_whose_run_failed_has_no_equal_time_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "failing", {"dora"})
    _, results = run(tmp_path, budget={"time": "lora"})
    assert [job.method for job in Worker.calls].count("dora") == 1
    assert [(each.method, each.why) for each in results.unmet] == [
        ("dora", "dora has no finished run at equal parameters on words, seed 1")
    ]


def test_where_the_method_aimed_at_failed_no_other_has_an_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "failing", {"lora"})
    _, results = run(tmp_path, budget={"time": "lora"})
    assert {each.method for each in results.unmet} == {"lora", "dora", "shadow"}
    assert {each.why for each in results.unmet} == {"lora has no finished run at equal parameters on words, seed 1"}


def test_sizes_are_chosen_for_equal_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "memory", {"shadow": 60.0, "lora": 60.0, "dora": 50.0})
    _, results = run(tmp_path, budget={"memory": "lora"})
    first, second = find(results, "parameters", "dora"), find(results, "memory", "dora")
    assert second["config"]["lora"]["rank"] > first["config"]["lora"]["rank"]
    wanted = find(results, "memory", "lora")["training"]["peak_memory_mb"]
    assert second["training"]["peak_memory_mb"] == pytest.approx(wanted, rel=0.001)
    assert find(results, "memory", "shadow")["columns"] == ["parameters", "memory"]


def test_memory_that_no_size_meets_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "memory", {"shadow": 800.0, "lora": 500.0, "full": 900.0})
    methods = {"lora": None, "shadow": {"shadow": SHADOW}, "full": None}
    _, results = run(tmp_path, methods=methods, budget={"memory": "lora"})
    said = {each.method: each.why for each in results.unmet}
    assert "at its smallest size it still needs about 800 MB" in said["shadow"]
    assert said["full"].endswith("full has no size to choose")


def test_a_size_that_the_method_refuses_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "memory", {"lora": 500.0, "miss": 300.0})
    _, results = run(tmp_path, methods={"lora": None, "miss": {"peft": {"r": 2}}}, budget={"memory": "lora"})
    ((method, why),) = [(each.method, each.why) for each in results.unmet]
    assert method == "miss"
    assert "must be less than or equal to in_features" in why
    assert not [row for row in results.rows if row["error"]]


def test_what_is_near_enough_is_compared_where_no_size_comes_nearer(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "memory", {"lora": 100.0, "full": 105.0})
    _, results = run(tmp_path, methods={"lora": None, "full": None}, budget={"memory": "lora"})
    assert results.unmet == []
    assert find(results, "memory", "full")["columns"] == ["parameters", "memory"]


def test_the_report_says_which_columns_are_won(tmp_path, monkeypatch):
    skills = {"lora": 0.5, "dora": 0.3, "shadow": 0.8}
    monkeypatch.setattr(Worker, "skill", staticmethod(lambda method, rate: skills.get(method, 0.1)))
    monkeypatch.setattr(Worker, "memory", {"shadow": 800.0})
    config, results = run(tmp_path, budget={"time": "lora", "memory": "lora"}, seeds=[1, 2])
    analysis = Analysis(config, results.rows)
    assert analysis.columns == ["parameters", "time", "memory"]
    first, *rest = conclusions(analysis, results)
    each = "the same passes, each method at its own size, equal wall time"
    assert first == f"shadow wins 2 of 3 columns: {each}."
    assert any(line.startswith("equal peak memory: lora wins (") for line in rest)
    tables = tables_of(analysis, results)
    rows = {row["method"]: row for row in tables["What each method wins"]}
    assert rows["shadow"]["equal wall time"].startswith("wins: +")
    assert rows["shadow"]["equal peak memory"] == "not compared"
    assert rows["lora"]["equal wall time"].startswith("loses: -")
    assert rows["lora"]["equal wall time"].endswith(" over shadow")
    assert "Results, equal wall time" in tables


def test_a_cost_that_was_not_met_as_measured_is_named(tmp_path, monkeypatch):
    config, results = run(tmp_path, budget={"time": "lora"})
    shadow = find(results, "time", "shadow")
    shadow["training"]["train_seconds"] = 150.0
    analysis = Analysis(config, results.rows)
    assert any("more than 10% off" in line and "words shadow 1.50" in line for line in conclusions(analysis, results))
    (row,) = [row for row in tables_of(analysis)["Results, equal wall time"] if row["method"] == "shadow"]
    assert row["of the time aimed at"] == "1.50"


def test_a_second_start_does_nothing_and_a_report_knows_all_columns(tmp_path):
    _, results = run(tmp_path, budget={"time": "lora", "memory": "lora"})
    done = len(Worker.calls)
    config, again = run(tmp_path, budget={"time": "lora", "memory": "lora"})
    assert len(Worker.calls) == done
    assert again.rows == results.rows
    assert rows_done(Plan.of(config)).rows == results.rows


def test_more_seeds_keep_the_steps_of_the_first(tmp_path):
    run(tmp_path, budget={"time": "lora"})
    done = len(Worker.calls)
    run(tmp_path, budget={"time": "lora"}, seeds=[1, 2])
    assert {job.seed for job in Worker.calls[done:]} == {2}


def test_a_method_without_a_size_is_not_counted_as_equal(tmp_path):
    methods = {"lora": None, "shadow": {"shadow": SHADOW}, "full": None}
    config, results = run(tmp_path, methods=methods, budget={"like": "shadow", "tolerance": 0.1})
    said = conclusions(Analysis(config, results.rows), results)
    assert any(line.startswith("full trains ") and "not one at equal parameters" in line for line in said)
    analysis = Analysis(config, results.rows)
    assert [row["method"] for row in analysis.standings()] == ["lora", "shadow"]
    assert {row["against"] for row in analysis.against_best()} == {"lora"}
    assert "full" in {row["against"] for row in analysis.differences()}


def test_only_a_trained_method_can_be_aimed_at(tmp_path):
    with pytest.raises(ConfigError, match=r"budget\.time: base is not trained"):
        compare_config(tmp_path, budget={"time": "base"})
    with pytest.raises(ConfigError, match=r"budget\.memory: there is no 'lorra' .*did you mean lora"):
        compare_config(tmp_path, budget={"memory": "lorra"})
    with pytest.raises(ConfigError, match="set either parameters or like"):
        compare_config(tmp_path, budget={"tolerance": 0.1})


def test_steps_are_scaled_where_steps_are_given():
    config = TrainConfig(data=DataConfig(train="x"), max_steps=10, shadow_epochs=3.0)
    assert scaled(config, 1.44) == {"max_steps": 14, "shadow_epochs": 4.32}
    assert scaled(config, 0.01)["max_steps"] == 1


def test_a_run_of_two_columns_is_one_run(tmp_path):
    config = compare_config(tmp_path)
    jobs = Plan.of(config).finals()
    from dataclasses import replace

    both = merged([*jobs, replace(jobs[1], columns=("time",))])
    assert [job.columns for job in both] == [("parameters",), ("parameters", "time"), ("parameters",)]
