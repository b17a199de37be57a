import pytest

from shadowtune.comparison.plan import Plan
from shadowtune.errors import ConfigError
from tests.support.comparisons import SHADOW, compare_config, compare_settings

SWEEP = {"grid": {"optimizer.learning_rate": [1e-3, 1e-2]}, "settings": {"max_steps": 2}}


def modes(job):
    return [(request.task, request.mode) for request in job.requests]


def test_the_base_once_then_each_method_with_each_seed(tmp_path):
    jobs = Plan.of(compare_config(tmp_path, seeds=[1, 2])).finals()
    assert [(job.method, job.seed, job.trains) for job in jobs] == [
        ("base", 1, False),
        ("lora", 1, True),
        ("shadow", 1, True),
        ("lora", 2, True),
        ("shadow", 2, True),
    ]
    assert [job.config.seed for job in jobs[1:]] == [1, 1, 2, 2]
    assert len({job.name for job in jobs}) == 5


def test_a_shadow_is_tested_detached_too_whoever_made_it(tmp_path):
    methods = {
        "base": None,
        "lora": None,
        "shadow": None,
        "peft-shadow": {"method": "peft", "peft": {"peft_type": "SHADOW"}},
    }
    found = {
        job.method: [mode for _, mode in modes(job)]
        for job in Plan.of(compare_config(tmp_path, methods=methods)).finals()
    }
    both = ["attached", "detached"]
    assert found == {"base": ["base"], "lora": ["attached"], "shadow": both, "peft-shadow": both}


def test_trials_see_validation_rows_and_one_seed_and_as_many_for_each_method(tmp_path):
    config = compare_config(tmp_path, sweep=SWEEP, seeds=[7, 8])
    trials = Plan.of(config).trials()
    assert [(job.method, job.setting["optimizer.learning_rate"]) for job in trials] == [
        ("lora", 1e-3),
        ("lora", 1e-2),
        ("shadow", 1e-3),
        ("shadow", 1e-2),
    ]
    assert {request.split for job in trials for request in job.requests} == {"validation"}
    assert {job.seed for job in trials} == {7}
    assert [job.config.optimizer.learning_rate for job in trials] == [1e-3, 1e-2] * 2
    assert {job.config.max_steps for job in trials} == {2}


def test_runs_that_count_take_what_was_chosen_and_all_their_steps(tmp_path):
    plan = Plan.of(compare_config(tmp_path, sweep=SWEEP))
    jobs = plan.finals({("words", "lora"): {"optimizer.learning_rate": 5e-3}})
    (lora,) = [job for job in jobs if job.method == "lora"]
    assert (lora.config.optimizer.learning_rate, lora.config.max_steps) == (5e-3, 4)
    assert {request.split for job in jobs for request in job.requests} == {"test"}


def test_what_was_not_chosen_does_not_run(tmp_path):
    plan = Plan.of(compare_config(tmp_path, sweep=SWEEP, seeds=[1, 2]))
    jobs = plan.finals({("words", "shadow"): {}})
    assert [(job.method, job.seed) for job in jobs] == [("base", 1), ("shadow", 1), ("shadow", 2)]


def test_a_task_that_is_not_known_is_named(tmp_path):
    with pytest.raises(ConfigError, match="gsm9k"):
        Plan.of(compare_config(tmp_path, tasks={"gsm9k": None}))


def test_a_trial_as_long_as_a_run_is_that_run(tmp_path):
    plan = Plan.of(compare_config(tmp_path, sweep={"grid": SWEEP["grid"]}))
    best = plan.trials()[1]
    (final,) = [job for job in plan.finals({("words", "lora"): best.setting}) if job.method == "lora"]
    assert final.path == best.path
    assert final.result_file != best.result_file


def test_the_budget_is_in_the_settings_of_trials_and_runs(tmp_path):
    plan = Plan.of(compare_config(tmp_path, sweep=SWEEP, budget={"like": "shadow", "tolerance": 0.1}))
    rank = plan.sizes["words"]["lora"].changes["lora.rank"]
    assert rank != 2
    assert {job.config.lora.rank for job in [*plan.trials(), *plan.finals()] if job.method == "lora"} == {rank}
    assert plan.rows()[1]["size"] == f"lora.rank {rank}, lora.alpha {16.0 * rank}"


def test_a_model_can_answer_the_rows_of_other_tasks_with_their_prompts_and_limits(tmp_path):
    settings = compare_settings(tmp_path)
    words = settings["tasks"]["words"]
    tasks = {
        "words": {**words, "test_tasks": ["words", "other"], "test_limit": 3},
        "other": {"data": {**words["data"], "template": "{prompt}?"}, "test_limit": 5},
    }
    jobs = Plan.of(compare_config(tmp_path, tasks=tasks, methods={"shadow": {"shadow": SHADOW}})).finals()
    assert modes(jobs[0]) == [
        ("words", "attached"),
        ("words", "detached"),
        ("other", "attached"),
        ("other", "detached"),
    ]
    assert [(request.limit, request.data.template) for request in jobs[0].requests[1:3]] == [
        (3, None),
        (5, "{prompt}?"),
    ]
    assert modes(jobs[1]) == [("other", "attached"), ("other", "detached")]


def test_only_the_tasks_asked_for_are_planned(tmp_path):
    words = compare_settings(tmp_path)["tasks"]["words"]
    config = compare_config(tmp_path, tasks={"words": words, "other": words}, only=["other"], sweep=SWEEP)
    plan = Plan.of(config)
    assert {job.task for job in [*plan.trials(), *plan.finals()]} == {"other"}
    assert {row["task"] for row in plan.rows()} == {"other"}
    assert plan.rows()[1] == {
        "task": "other", "method": "lora", "trainable_parameters": 3712, "size": "", "trials": 2, "runs": 1,
    }  # fmt: skip


def test_only_the_methods_asked_for_are_planned(tmp_path):
    plan = Plan.of(compare_config(tmp_path, only=["shadow"], sweep=SWEEP))
    assert {job.method for job in [*plan.trials(), *plan.finals()]} == {"shadow"}
    assert {job.task for job in plan.finals()} == {"words"}
    assert [row["method"] for row in plan.rows()] == ["shadow"]
