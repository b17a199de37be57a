"""Accuracy and cost of every confidence threshold on examples that both sides have answered, and the choice of one.

An answer whose confidence c is below the threshold t is deferred. With scores e of the edge and k of the cloud,

    accuracy(t) = mean(k where c < t, else e),   rate(t) = mean(c < t),   cost(t) = mean(cost where c < t, else 0).

Only thresholds between two different confidences differ.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shadowtune.config.serving import CurvePoint, Prices, SignalName, Weights
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.edge.confidence import Signals, confidence
from shadowtune.serving.requests import Usage

ALWAYS = -1.0
"""Confidence of an answer that is deferred whatever the threshold: the tag."""


def response_cost(prices: Prices, usage: Usage) -> float:
    """Return the cost of a response of the cloud."""
    return prices.request + prices.prompt * usage.prompt_tokens + prices.completion * usage.completion_tokens


@dataclass(frozen=True)
class CalibrationExample:
    """One example that both sides have answered."""

    signals: Signals
    """Of the edge's answer."""
    tagged: bool
    """Whether the edge's answer is the tag, which defers whatever the threshold."""
    edge_score: float
    """From 0 to 1, as the cloud's."""
    cloud_score: float
    cost: float
    """Of the cloud's answer."""
    corrected: bool = False
    """Whether the cloud's answer is another text than the edge's."""

    @property
    def cloud_helps(self) -> bool:
        """Whether the cloud's answer is better."""
        return self.cloud_score > self.edge_score


@dataclass(frozen=True)
class CalibrationTarget:
    """The target of a threshold.

    An accuracy at the least cost, the best accuracy within a deferral rate or cost, or the fewest deferrals with a
    guaranteed loss of accuracy, compared with the cloud alone.
    """

    kind: Literal["accuracy", "deferral-rate", "cost", "accuracy-loss"]
    value: float
    confidence: float = 0.95
    """Probability of the guarantee."""


def confidences(
    examples: Sequence[CalibrationExample], signal: SignalName, weights: Weights | None = None
) -> list[float]:
    """Return the confidence of each edge answer, ``ALWAYS`` for the tag."""
    return [ALWAYS if each.tagged else confidence(each.signals, signal, weights) for each in examples]


def deferral_curve(examples: Sequence[CalibrationExample], sure: Sequence[float]) -> list[CurvePoint]:
    """Return accuracy, deferral rate and cost of every threshold that makes a difference, by rising threshold.

    Args:
        examples: at least one.
        sure: the confidence of each. With tags, the first point (no deferral at all) has a negative threshold, which
            cannot be set.
    """
    order = np.argsort(sure, kind="stable")
    levels = np.asarray(sure, float)[order]
    edge = np.asarray([each.edge_score for each in examples], float)[order]
    cloud = np.asarray([each.cloud_score for each in examples], float)[order]
    cost = np.asarray([each.cost for each in examples], float)[order]
    starts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(examples)]
    corrected = np.asarray([each.corrected for each in examples], float)[order]
    gains, costs, corrections = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (cloud - edge, cost, corrected)
    )
    return [
        CurvePoint(
            threshold_between(levels, start),
            float((edge.sum() + gains[start]) / len(examples)),
            start / len(examples),
            float(costs[start] / len(examples)),
            float(corrections[start] / len(examples)),
        )
        for start in starts
    ]


def threshold_between(levels: np.ndarray, start: int) -> float:
    """Return a threshold above the first ``start`` sorted confidences and not above the next."""
    if start == 0:
        return min(0.0, float(levels[0]))
    below = float(levels[start - 1])
    if start == len(levels):
        return math.nextafter(max(below, 0.0), math.inf)
    above = float(levels[start])
    return max(0.0, min(above, max((below + above) / 2, math.nextafter(below, math.inf))))


def area(points: Sequence[CurvePoint]) -> float:
    """Return the area under accuracy over deferral rate from 0 to 1: the mean accuracy of all rates."""
    pairs = itertools.pairwise(points)
    return sum((b.deferral_rate - a.deferral_rate) * (a.accuracy + b.accuracy) / 2 for a, b in pairs)


def area_of(sure: np.ndarray, edge: np.ndarray, cloud: np.ndarray) -> float:
    """Return the area of a deferral curve without making its points; arguments are (N,): confidences and scores."""
    order = np.argsort(sure, kind="stable")
    levels = sure[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(levels)) + 1, [len(levels)]])
    heights = (edge.sum() + np.concatenate([[0.0], np.cumsum((cloud - edge)[order])])[starts]) / len(levels)
    return float((np.diff(starts) * (heights[1:] + heights[:-1])).sum() / 2 / len(levels))


def random_area(examples: Sequence[CalibrationExample]) -> float:
    """Return the area of deferring at random."""
    return sum(each.edge_score + each.cloud_score for each in examples) / 2 / len(examples)


def oracle_area(examples: Sequence[CalibrationExample]) -> float:
    """Return the area of deferring in the order of the gain, which no router exceeds."""
    return area(deferral_curve(examples, [each.edge_score - each.cloud_score for each in examples]))


def choose_threshold(points: Sequence[CurvePoint], target: CalibrationTarget, count: int) -> CurvePoint:
    """Return the point of a curve that fits a target best.

    A limit on rate or cost is used up, since few examples do not show which rate within it is best; but not where that
    is less accurate than the best by more than a standard error.

    Args:
        points: of ``deferral_curve``.
        target: the target.
        count: number of examples of the curve.

    Raises:
        ShadowtuneError: if no threshold reaches the target; with the best that can be reached.
    """
    able = [point for point in points if point.threshold >= 0]
    if target.kind == "accuracy":
        good = [point for point in able if point.accuracy >= target.value - 1e-12]
        if good:
            return min(good, key=lambda point: (point.cost, point.deferral_rate))
        best = max(able, key=lambda point: (point.accuracy, -point.deferral_rate))
        raise ShadowtuneError(
            f"no threshold reaches accuracy {target.value:g}: the best is {best.accuracy:.4f}, deferring "
            f"{best.deferral_rate:.1%}; ask for less, or train a better edge or cloud"
        )
    spent = {id(point): point.deferral_rate if target.kind == "deferral-rate" else point.cost for point in able}
    good = [point for point in able if spent[id(point)] <= target.value + 1e-12]
    if good:
        most = max(point.accuracy for point in good)
        error = math.sqrt(most * (1 - most) / count)
        return max((p for p in good if p.accuracy >= most - error), key=lambda p: (p.deferral_rate, p.accuracy))
    raise ShadowtuneError(
        f"no threshold keeps {target.kind} to {target.value:g}: the edge's tag alone comes to "
        f"{min(spent.values()):.4g}; allow that much"
    )


def at_threshold(examples: Sequence[CalibrationExample], sure: Sequence[float], threshold: float) -> CurvePoint:
    """Return accuracy, deferral rate and cost of one threshold on at least one example."""
    pairs = [(each, level < threshold) for each, level in zip(examples, sure, strict=True)]
    return CurvePoint(
        threshold,
        sum(each.cloud_score if deferred else each.edge_score for each, deferred in pairs) / len(pairs),
        sum(deferred for _, deferred in pairs) / len(pairs),
        sum(each.cost for each, deferred in pairs if deferred) / len(pairs),
        sum(each.corrected for each, deferred in pairs if deferred) / len(pairs),
    )


def thinned(points: Sequence[CurvePoint], kept: CurvePoint, count: int = 200) -> tuple[CurvePoint, ...]:
    """Return at most ``count`` points with a threshold that can be set, with both ends and ``kept``."""
    able = [point for point in points if point.threshold >= 0]
    last = len(able) - 1
    if last < count:
        return tuple(able)
    numbers = {round(index * last / (count - 2)) for index in range(count - 1)} | {able.index(kept)}
    return tuple(able[number] for number in sorted(numbers))
