from pathlib import Path

import pytest

from shadowtune.comparison.plan import Search
from shadowtune.config.sweep import RATE, SweepConfig

GRID = {RATE: [1e-4, 1e-3, 1e-2]}


class Trial:
    """A trial whose result a table knows: accuracy and loss by (task, rate, seed), None where it failed."""

    def __init__(self, known, task, setting, seed):
        self.task, self.method, self.setting, self.seed = task, "lora", setting, seed
        self.key = (task, setting[RATE], seed)
        self.result_file = Path(f"{self.key}")
        self._known = known

    def result(self):
        if self.key not in self._known:
            return None
        found = self._known[self.key]
        if found is None:
            return {"error": "nan", "evaluations": []}
        return {"error": None, "evaluations": [{"accuracy": found[0], "loss": found[1]}]}


def is_done(found):
    return all(job.result() is not None for job in found.trials())


def search(known, grid=GRID, tasks=("a",), seeds=(1,), **settings):
    sweep = SweepConfig(grid=grid, **settings)
    return Search(sweep, sweep.grid_of("lora"), sweep.trials("lora"), tasks, seeds, lambda *at: Trial(known, *at))


def run(known, value, **settings):
    """Do trials until none is left, of accuracy ``value(task, rate, seed)``; return the search and the keys."""
    found = search(known, **settings)
    order = []
    while fresh := [job for job in found.trials() if job.result() is None]:
        for job in fresh:
            known[job.key] = value(*job.key)
            order.append(job.key)
    return found, order


def test_the_most_accurate_is_best_and_the_loss_decides_between_equals():
    known = {("a", 1e-4, 1): (0.5, 0.1), ("a", 1e-3, 1): (0.7, 0.9), ("a", 1e-2, 1): (0.7, 0.8)}
    assert search(known).chosen() == {RATE: 1e-2}
    assert search(known, select="loss").chosen() == {RATE: 1e-4}


def test_a_failed_trial_is_worse_than_any_and_where_all_failed_there_is_nothing_to_choose():
    known = {("a", 1e-4, 1): None, ("a", 1e-3, 1): (0.0, 99.0), ("a", 1e-2, 1): None}
    assert search(known).chosen() == {RATE: 1e-3}
    assert search(dict.fromkeys(known)).chosen() is None
    assert is_done(search(dict.fromkeys(known)))


def test_of_equals_the_one_in_the_middle_is_best_so_that_a_tie_extends_no_grid():
    found, order = run({}, lambda task, rate, seed: (0.5, 1.0), extend=2)
    assert found.chosen() == {RATE: 1e-3}
    assert len(order) == 3


def test_nothing_is_chosen_while_a_trial_is_open():
    known = {("a", 1e-4, 1): (0.5, 0.1), ("a", 1e-3, 1): (0.7, 0.9)}
    assert search(known).chosen() is None
    assert not is_done(search(known))


def test_a_setting_is_judged_by_its_mean_over_the_tuning_tasks():
    values = {
        ("a", 1e-4): 0.9,
        ("b", 1e-4): 0.1,
        ("a", 1e-3): 0.6,
        ("b", 1e-3): 0.6,
        ("a", 1e-2): 0.1,
        ("b", 1e-2): 0.7,
    }
    found, _ = run({}, lambda task, rate, seed: (values[task, rate], 1.0), tasks=("a", "b"))
    assert found.chosen() == {RATE: 1e-3}


def test_the_grid_grows_one_value_at_a_time_while_the_best_is_at_its_edge():
    found, order = run({}, lambda task, rate, seed: (-abs(rate - 0.1), 1.0), extend=4)
    assert [rate for _, rate, _ in order] == [1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert found.chosen() == {RATE: 0.1}


def test_the_grid_grows_downwards_too_and_no_further_than_the_limit():
    found, order = run({}, lambda task, rate, seed: (1 - rate, 1.0), extend=2)
    assert [rate for _, rate, _ in order] == [1e-4, 1e-3, 1e-2, 1e-5, 1e-6]
    assert found.chosen() == {RATE: 1e-6}


def test_without_extensions_the_edge_is_taken_as_it_is():
    found, order = run({}, lambda task, rate, seed: (rate, 1.0))
    assert len(order) == 3
    assert found.chosen() == {RATE: 1e-2}


def test_the_best_two_are_tried_with_all_seeds_and_the_best_mean_wins():
    values = {1e-4: [0.1, 0.1, 0.1], 1e-3: [0.8, 0.9, 0.9], 1e-2: [0.85, 0.5, 0.5]}
    found, order = run({}, lambda task, rate, seed: (values[rate][seed - 1], 1.0), seeds=(1, 2, 3), finalists=2)
    assert sorted(order[3:]) == [("a", 1e-3, 2), ("a", 1e-3, 3), ("a", 1e-2, 2), ("a", 1e-2, 3)]
    assert found.chosen() == {RATE: 1e-3}


def test_finalists_are_judged_after_the_grid_has_grown():
    found, order = run({}, lambda task, rate, seed: (min(rate, 0.05), 1.0), seeds=(1, 2), finalists=2, extend=1)
    assert ("a", 0.1, 1) in order
    assert {rate for _, rate, seed in order if seed == 2} == {1e-2, 0.1}
    assert found.chosen() == {RATE: 0.1}


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_what_was_done_is_not_asked_for_again(seeds):
    known = {}
    run(known, lambda task, rate, seed: (rate, 1.0), seeds=seeds, finalists=2, extend=1)
    _, order = run(known, lambda *at: pytest.fail("done twice"), seeds=seeds, finalists=2, extend=1)
    assert order == []
