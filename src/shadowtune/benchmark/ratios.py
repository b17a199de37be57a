"""Ratios of samples taken in turn: the machine's drift hits both of a pair, and drops out."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Ours over a peer's, round by round."""

    ratio: float
    """Median of the ratios of the rounds."""
    ratio_low: float
    """Their 10th percentile."""
    ratio_high: float
    """Their 90th percentile."""
    n: int
    """How many rounds."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values lie, interpolated linearly between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def pairwise_ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Divide sample i of ours by sample i of the peer, and describe the ratios."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Ratio(statistics.median(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9), len(ratios))
