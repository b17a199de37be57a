import pytest
import torch
from torch import nn

from benchmarks.benchmark import Settings
from benchmarks.measurement import TimedCandidate


class Counted(TimedCandidate):
    """Its step costs no time; the clock of a test says how long it took."""

    def __init__(self, warm_up=1):
        super().__init__(Settings(warm_up=warm_up))
        self.done = 0

    def _step(self):
        self.done += 1


def test_a_sample_is_warmed_up_and_divides_its_steps_by_their_time_alone(monkeypatch):
    one = Counted(warm_up=2)
    clock = iter([0.0, 7.0, 7.0, 7.02, 8.0, 9.0, 9.0, 9.2])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    one.warm()
    assert (one.steps, one.done) == (5, 3)  # 0.1 s at 0.02 s a step
    assert one.steps_per_second() == pytest.approx(5 / 0.2)
    assert one.done == 3 + 2 + 5


def test_what_is_loaded_counts_for_no_step():
    one = Counted()
    one.mark_loaded(nn.Linear(4, 4))
    assert one.loaded_mb > 0
    one.loaded_mb = 1e9
    assert one.warm() == 0.0


def test_a_candidate_trains_nothing_until_it_says_so():
    one = Counted()
    assert (one.size, one.trainable_parameters, one.device) == (None, 0, torch.device("cpu"))
