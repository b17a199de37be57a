"""What every threshold of a confidence comes to on requests that both sides have answered, and which one to take.

An answer whose confidence c is below the threshold t is handed over. With e and k the scores of edge and cloud,

    accuracy(t) = mean(k where c < t, else e),   rate(t) = mean(c < t),   cost(t) = mean(cost where c < t, else 0).

Only thresholds between two different confidences differ; answers that are equally confident go together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shadowtune.config.policy import CurvePoint, SignalName, Weights
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.edge.policies import confidence
from shadowtune.serving.edge.signals import Signals

ALWAYS = -1.0
"""Confidence of an answer that is handed over whatever the threshold: the tag."""


@dataclass(frozen=True)
class Measured:
    """One request that both sides have answered."""

    signals: Signals
    """Of the edge's answer."""
    tagged: bool
    """Whether the edge's answer is the tag, so that the cloud answers whatever the threshold."""
    edge_score: float
    """From 0 to 1, as the cloud's."""
    cloud_score: float
    cost: float
    """Of the cloud's answer."""


@dataclass(frozen=True)
class Aim:
    """What a threshold is to reach: accuracy at the least cost, or the best accuracy within a share or a cost."""

    kind: Literal["accuracy", "hand-over", "cost"]
    value: float


def confidences(rows: Sequence[Measured], signal: SignalName, weights: Weights | None = None) -> list[float]:
    """Return the confidence of each row's answer, ``ALWAYS`` where it is the tag."""
    return [ALWAYS if row.tagged else confidence(row.signals, signal, weights) for row in rows]


def curve(rows: Sequence[Measured], sure: Sequence[float]) -> list[CurvePoint]:
    """Return what every threshold that makes a difference comes to, by rising threshold.

    Args:
        rows: at least one.
        sure: the confidence of each. Where some are ``ALWAYS``, the first point, below them, is no threshold that can
            be set: nothing at all is handed over there.
    """
    order = np.argsort(sure, kind="stable")
    levels = np.asarray(sure, float)[order]
    edge, cloud, cost = (
        np.asarray([vars(row)[name] for row in rows], float)[order] for name in ("edge_score", "cloud_score", "cost")
    )
    starts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(rows)]
    gains, costs = (np.concatenate([[0.0], np.cumsum(values)]) for values in (cloud - edge, cost))
    return [
        CurvePoint(
            _threshold(levels, start),
            float((edge.sum() + gains[start]) / len(rows)),
            start / len(rows),
            float(costs[start] / len(rows)),
        )
        for start in starts
    ]


def _threshold(levels: np.ndarray, start: int) -> float:
    """A threshold above the first ``start`` sorted confidences and not above the next."""
    if start == 0:
        return min(0.0, float(levels[0]))
    below = float(levels[start - 1])
    if start == len(levels):
        return math.nextafter(max(below, 0.0), math.inf)
    above = float(levels[start])
    return max(0.0, min(above, max((below + above) / 2, math.nextafter(below, math.inf))))


def area(points: Sequence[CurvePoint]) -> float:
    """Area under accuracy over hand-over rate, from nothing to everything: the mean accuracy of all rates."""
    pairs = itertools.pairwise(points)
    return sum((b.hand_over_rate - a.hand_over_rate) * (a.accuracy + b.accuracy) / 2 for a, b in pairs)


def random_area(rows: Sequence[Measured]) -> float:
    """What handing over by chance has for an area."""
    return sum(row.edge_score + row.cloud_score for row in rows) / 2 / len(rows)


def oracle_area(rows: Sequence[Measured]) -> float:
    """What handing over those first that gain the most has for an area; no router can have more."""
    gains = [row.edge_score - row.cloud_score for row in rows]
    return area(curve(rows, gains))


def choose_threshold(points: Sequence[CurvePoint], aim: Aim, rows: int) -> CurvePoint:
    """Return the point of a curve that reaches an aim best.

    What a share or a cost allows is used up, for few rows do not tell which rate within it is best; but not where that
    is less accurate than the best by more than a standard error.

    Args:
        points: of ``curve``.
        aim: the aim.
        rows: how many the curve was measured on.

    Raises:
        ShadowtuneError: if none does, saying what can be reached.
    """
    able = [point for point in points if point.threshold >= 0]
    if aim.kind == "accuracy":
        good = [point for point in able if point.accuracy >= aim.value - 1e-12]
        if good:
            return min(good, key=lambda point: (point.cost, point.hand_over_rate))
        best = max(able, key=lambda point: (point.accuracy, -point.hand_over_rate))
        raise ShadowtuneError(
            f"no threshold reaches accuracy {aim.value:g}: the best is {best.accuracy:.4f}, handing over "
            f"{best.hand_over_rate:.1%}; ask for less, or train a better edge or cloud"
        )
    name = {"hand-over": "hand_over_rate", "cost": "cost"}[aim.kind]
    good = [point for point in able if vars(point)[name] <= aim.value + 1e-12]
    if good:
        most = max(point.accuracy for point in good)
        error = math.sqrt(most * (1 - most) / rows)
        return max((p for p in good if p.accuracy >= most - error), key=lambda p: (p.hand_over_rate, p.accuracy))
    least = min(vars(point)[name] for point in able)
    raise ShadowtuneError(
        f"no threshold keeps {aim.kind} to {aim.value:g}: the edge's tag alone comes to {least:.4g}; allow that much"
    )


def at_threshold(rows: Sequence[Measured], sure: Sequence[float], threshold: float) -> CurvePoint:
    """Return what one threshold comes to on rows, at least one."""
    asked = [level < threshold for level in sure]
    pairs = list(zip(rows, asked, strict=True))
    return CurvePoint(
        threshold,
        sum(row.cloud_score if over else row.edge_score for row, over in pairs) / len(rows),
        sum(asked) / len(rows),
        sum(row.cost for row, over in pairs if over) / len(rows),
    )


def thinned(points: Sequence[CurvePoint], kept: CurvePoint, count: int = 200) -> tuple[CurvePoint, ...]:
    """Return at most ``count`` points that can be set, both ends and the chosen one among them."""
    able = [point for point in points if point.threshold >= 0]
    last = len(able) - 1
    if last < count:
        return tuple(able)
    numbers = {round(index * last / (count - 2)) for index in range(count - 1)} | {able.index(kept)}
    return tuple(able[number] for number in sorted(numbers))
