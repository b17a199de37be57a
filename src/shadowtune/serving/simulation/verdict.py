"""A result in a sentence, against the cloud alone."""

import math
from dataclasses import dataclass

from shadowtune.serving.simulation.world import Result


@dataclass(frozen=True)
class Verdict:
    """A policy against the cloud alone, on the same requests."""

    policy: str
    points: float
    """Accuracy less that of the cloud alone, in points of a hundred."""
    low: float
    """Ends of its 95 % interval, likewise."""
    high: float
    hand_over_rate: float
    latency_ratio: float
    """Median latency over that of the cloud alone."""
    cost_ratio: float
    """Cost likewise."""

    def __str__(self) -> str:
        if self.low > 0:
            word = "more often right than the cloud alone"
        elif self.high < 0:
            word = "less often right than the cloud alone"
        else:
            word = "as often right as the cloud alone, as far as these requests tell"
        return (
            f"{self.policy}: {word} ({self.points:+.1f} points, 95 % interval {self.low:+.1f} to {self.high:+.1f}), "
            f"hands over {self.hand_over_rate:.1%}, has {self.latency_ratio:.2f} of its median latency and "
            f"{self.cost_ratio:.2f} of its cost"
        )


def judge(result: Result, cloud: Result, interval: tuple[float, float]) -> Verdict:
    """Compare a result with that of the cloud alone.

    Args:
        result: of any policy.
        cloud: of the same requests, all answered by the cloud.
        interval: of the difference of their accuracies, as shares.
    """
    return Verdict(
        result.policy,
        100 * (result.accuracy - cloud.accuracy),
        100 * interval[0],
        100 * interval[1],
        result.hand_over_rate,
        _ratio(result.p50, cloud.p50),
        _ratio(result.cost, cloud.cost),
    )


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.inf if value else 0.0
