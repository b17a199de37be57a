import pytest

from shadowtune.serving.simulation.report import summarize
from shadowtune.serving.simulation.simulator import SimulationResult

CLOUD = SimulationResult("always-cloud", 0.9, 1.0, 40.0, 0.5, 0.6, 0.7, 100.0)


def result(accuracy, cost=10.0, p50=0.05):
    return SimulationResult("mine", accuracy, 0.25, cost, p50, 0.6, 0.7, 100.0)


@pytest.mark.parametrize(
    ("interval", "words", "told"),
    [
        ((0.001, 0.02), "more often right than the cloud alone", "+0.1 to +2.0"),
        ((-0.02, 0.015), "as often right as the cloud alone, as far as these requests tell", "-2.0 to +1.5"),
        ((0.0, 0.0), "as often right as the cloud alone, as far as these requests tell", "+0.0 to +0.0"),
        ((-0.02, -0.001), "less often right than the cloud alone", "-2.0 to -0.1"),
    ],
)
def test_the_words_go_by_the_interval_and_the_figures_are_told(interval, words, told):
    assert str(summarize(result(0.91), CLOUD, interval)) == (
        f"mine: {words} (+1.0 points, 95 % interval {told}), defers 25.0%, has 0.10 of its median latency and 0.25 "
        "of its cost"
    )


def test_ratios_to_nothing_are_numbers():
    free = SimulationResult("always-cloud", 0.9, 1.0, 0.0, 0.5, 0.6, 0.7, 100.0)
    assert summarize(result(0.9, cost=0.0), free, (0, 0)).cost_ratio == 0
    assert summarize(result(0.9, cost=1.0), free, (0, 0)).cost_ratio == float("inf")
