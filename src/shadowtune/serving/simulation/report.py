"""Report of a simulation: a summary sentence for each policy, and a plot of accuracy over cost and latency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shadowtune.serving.simulation.simulator import SimulationResult
from shadowtune.tables import keep_within, line_style

MARKERS = {"always-edge": "s", "always-cloud": "D", "lora-cloud": "v", "verify": "^", "oracle": "*"}
AXES = {"cost": "cost of 1,000 requests, in the unit of the token price", "p50": "median latency, s"}


@dataclass(frozen=True)
class PolicySummary:
    """A policy compared with the cloud alone on the same requests; ``str`` gives it as a sentence."""

    policy: str
    points: float
    """Difference of the accuracies in percentage points."""
    low: float
    """Ends of its 95 % interval."""
    high: float
    deferral_rate: float
    latency_ratio: float
    """Median latency divided by that of the cloud alone."""
    cost_ratio: float
    """Cost likewise."""

    def __str__(self) -> str:
        if self.low > 0:
            words = "more often right than the cloud alone"
        elif self.high < 0:
            words = "less often right than the cloud alone"
        else:
            words = "as often right as the cloud alone, as far as these requests tell"
        return (
            f"{self.policy}: {words} ({self.points:+.1f} points, 95 % interval {self.low:+.1f} to {self.high:+.1f}), "
            f"defers {self.deferral_rate:.1%}, has {self.latency_ratio:.2f} of its median latency and "
            f"{self.cost_ratio:.2f} of its cost"
        )


def summarize(result: SimulationResult, cloud: SimulationResult, interval: tuple[float, float]) -> PolicySummary:
    """Compare a result with that of the cloud alone.

    Args:
        result: of any policy.
        cloud: of the policy "always-cloud" on the same requests.
        interval: 95 % interval of the difference of their accuracies, as fractions.
    """
    return PolicySummary(
        result.policy,
        100 * (result.accuracy - cloud.accuracy),
        100 * interval[0],
        100 * interval[1],
        result.deferral_rate,
        _ratio(result.p50, cloud.p50),
        _ratio(result.cost, cloud.cost),
    )


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.inf if value else 0.0


def plot_simulation(figure: Any, results: Sequence[SimulationResult], curve: Sequence[SimulationResult]) -> None:
    """Plot results, and the points of a threshold sweep, into an empty matplotlib figure."""
    random = [result for result in results if result.policy.startswith("random ")]
    others = [result for result in results if result not in random]
    for axes, (x, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        axes.plot(*_points(random, x), ".:", color="#9aa0a6", label="random")
        if curve:
            axes.plot(
                *_points(curve, x), line_style(len(curve)), color="#3b6fd4", linewidth=1.2, label="every threshold"
            )
        for number, result in enumerate(others):
            marker = MARKERS.get(result.policy, "o")
            axes.plot(*_points([result], x), marker, color=f"C{number}", markersize=8, label=result.policy)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    left, right = figure.axes
    left.set(ylabel="accuracy, %")
    right.set(xscale="log")
    keep_within(left.yaxis, 0, 100)  # shared by both
    keep_within(left.xaxis, 0)
    right.legend(fontsize="small")


def _points(results: Sequence[SimulationResult], x: str) -> tuple[list[float], list[float]]:
    return [vars(result)[x] for result in results], [100 * result.accuracy for result in results]
