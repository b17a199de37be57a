from dataclasses import replace

import pytest

from shadowtune.comparison.estimate import TimeLeft
from shadowtune.comparison.execution import describe
from shadowtune.tables import duration
from tests.comparison.test_job import job
from tests.support.comparisons import result_row


def jobs(tmp_path, *names):
    return [job(tmp_path, task=task, method=method, seed=seed) for seed, (task, method) in enumerate(names)]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (5400, "1 h 30 min"), (11100, "3 h 05 min")]
)
def test_times_read_aloud(seconds, words):
    assert duration(seconds) == words


def test_nothing_is_foretold_before_anything_is_known(tmp_path):
    assert str(TimeLeft(jobs(tmp_path, ("t", "lora")), [], 1)) == "1 left"


def test_a_run_takes_as_long_as_those_like_it(tmp_path):
    todo = jobs(tmp_path, ("a", "lora"), ("a", "lora"), ("a", "shadow"), ("b", "lora"))
    left = TimeLeft(todo, [result_row("shadow", [1.0], task="b", seconds=100.0)], 1)
    left.finish(todo[0], 10.0)
    assert left.seconds() == 10 + 10 + 100  # the same method, else the same task
    assert str(left) == "3 left, about 2 min"
    assert TimeLeft(todo[1:], [result_row("lora", [1.0], task="a", seconds=10.0)], 2).seconds() == 15


def test_failures_say_nothing_about_time(tmp_path):
    assert TimeLeft(jobs(tmp_path, ("t", "lora")), [result_row("lora", [1.0], error="x")], 1).seconds() is None


def test_the_last_run_is_the_last(tmp_path):
    todo = jobs(tmp_path, ("t", "lora"))
    left = TimeLeft(todo, [], 1)
    left.finish(replace(todo[0]), 1.0)
    assert str(left) == "that was the last"


def test_a_line_says_what_a_run_found_or_why_not():
    row = result_row("shadow", [1.0, 0.0], detached=[0.0, 0.0], setting={"epochs": 2})
    assert describe(row) == "words/shadow/seed-1-00000000 epochs=2: words attached 50.0 %, words detached 0.0 % in 3 s"
    assert describe({**row, "error": "no room"}).endswith("seed-1-00000000 epochs=2: failed: no room")
