import pytest

from shadowtune.comparison.analysis import Analysis
from shadowtune.config.comparison import CompareConfig
from shadowtune.config.settings import from_mapping
from tests.support.comparisons import result_row

GOOD, FAIR = [1.0] * 300 + [0.0] * 100, [1.0] * 240 + [0.0] * 160
DETACHED = [1.0] * 100 + [0.0] * 300


def config(**changes):
    settings = {
        "tasks": {"words": {}, "other": {}},
        "methods": {"base": {}, "lora": {}, "shadow": {}, "shadow-b": {"method": "shadow"}},
        "seeds": [1, 2],
    }
    return from_mapping(CompareConfig, {**settings, **changes}, where="")


def rows():
    found = [result_row("base", DETACHED, mode="base")]
    for seed in (1, 2):
        found.append(result_row("lora", FAIR, seed))
        found.append(result_row("shadow", GOOD, seed, detached=DETACHED))
        found.append(result_row("shadow-b", GOOD, seed, detached=GOOD))
    return found


def find(table, **keys):
    (row,) = [row for row in table if all(row[key] == value for key, value in keys.items())]
    return row


def test_each_method_and_mode_has_a_mean_an_interval_and_its_costs():
    table = Analysis(config(), rows()).summary()
    assert [(row["method"], row["mode"]) for row in table] == [
        ("base", "base"),
        ("lora", "attached"),
        ("shadow", "attached"),
        ("shadow", "detached"),
        ("shadow-b", "attached"),
        ("shadow-b", "detached"),
    ]
    shadow = find(table, method="shadow", mode="attached")
    assert (shadow["accuracy"], shadow["test_rows"], shadow["seeds"]) == (0.75, 400, 2)
    assert 0.69 < shadow["accuracy_low"] < 0.72 < 0.78 < shadow["accuracy_high"] < 0.81
    assert (shadow["trainable_parameters"], shadow["train_seconds"]) == (1000, 2.0)
    assert shadow["answer_seconds"] == 0.5
    assert find(table, method="base")["train_seconds"] is None
    assert find(table, method="shadow", mode="detached")["of_attached"] == pytest.approx(0.25 / 0.75)
    assert shadow["of_attached"] is None


def test_the_reference_is_compared_with_every_other_method_in_both_modes():
    table = Analysis(config(), rows()).differences()
    assert {(row["against"], row["mode"]) for row in table} == {
        ("base", "attached"),
        ("lora", "attached"),
        ("shadow-b", "attached"),
        ("base", "detached"),
        ("shadow-b", "detached"),
    }
    assert find(table, against="lora") | {"points_low": 0, "points_high": 0} == {
        "task": "words", "mode": "attached", "against": "lora", "points": pytest.approx(15.0), "outcome": "better",
        "points_low": 0, "points_high": 0,
    }  # fmt: skip
    assert find(table, against="shadow-b", mode="attached")["outcome"] == "undecided"
    assert find(table, against="shadow-b", mode="detached")["outcome"] == "worse"
    assert find(table, against="base", mode="detached")["points"] == 0


def test_differences_are_paired_by_example():
    width = find(Analysis(config(), rows()).differences(), against="lora")
    shuffled = [*FAIR[200:], *FAIR[:200]]  # as many right answers, to other questions
    others = [result_row("lora", shuffled, row["seed"]) if row["method"] == "lora" else row for row in rows()]
    wide = find(Analysis(config(), others).differences(), against="lora")
    assert wide["points"] == width["points"]
    assert wide["points_high"] - wide["points_low"] > 1.5 * (width["points_high"] - width["points_low"])


def test_only_seeds_of_both_are_compared():
    kept = [row for row in rows() if (row["method"], row["seed"]) != ("lora", 2)]
    kept = [
        {**row, "evaluations": [{**row["evaluations"][0], "scores": DETACHED}]}
        if (row["method"], row["seed"]) == ("shadow", 2)
        else row
        for row in kept
    ]
    assert find(Analysis(config(), kept).differences(), against="lora")["points"] == pytest.approx(15.0)


def test_several_tasks_have_a_mean_in_which_each_counts_the_same():
    both = [*rows(), result_row("lora", [1.0, 1.0], task="other"), result_row("shadow", [1.0, 0.0], task="other")]
    table = Analysis(config(), both).differences()
    assert find(table, against="lora", task="other")["points"] == -50
    assert find(table, against="lora", task="all tasks")["points"] == pytest.approx((15 - 50) / 2)


def test_the_best_of_the_other_kinds_is_the_one_to_beat():
    methods = {"base": {}, "lora": {}, "dora": {}, "shadow": {}, "shadow-b": {"method": "shadow"}}
    table = Analysis(config(methods=methods), [*rows(), result_row("dora", DETACHED)]).against_best()
    assert [(row["task"], row["against"]) for row in table] == [("words", "lora")]
    assert table[0]["points"] == pytest.approx(15.0)


def test_trials_and_failures_are_not_results():
    extra = [result_row("lora", [0.0] * 400, stage="trial"), result_row("dora", [0.0], error="no", evaluations=[])]
    analysis = Analysis(config(), [*rows(), *extra])
    assert find(analysis.summary(), method="lora")["accuracy"] == pytest.approx(0.6)
    assert [row["error"] for row in analysis.failed] == ["no"]


def test_models_tested_on_another_task_have_a_place_of_their_own():
    row = result_row("lora", FAIR)
    row["evaluations"].append({**row["evaluations"][0], "task": "other", "scores": GOOD})
    assert [(row["task"], row["accuracy"]) for row in Analysis(config(), [row]).summary()] == [
        ("words", pytest.approx(0.6)),
        ("words -> other", pytest.approx(0.75)),
    ]


def test_few_rows_are_named():
    analysis = Analysis(config(), [*rows(), result_row("lora", [1.0] * 299, task="other")])
    assert analysis.small() == {"other": 299}
