"""From requests that both sides have answered to a policy: one half chooses it, the other half checks it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shadowtune.config.policy import CurvePoint, PolicyConfig, Prices, SignalName
from shadowtune.serving.edge.calibration import (
    Aim,
    Measured,
    area,
    at_threshold,
    choose_threshold,
    confidences,
    curve,
    oracle_area,
    random_area,
    thinned,
)
from shadowtune.serving.edge.learning import held_out_confidences, learn

SIGNALS: tuple[SignalName, ...] = get_args(SignalName)


@dataclass(frozen=True)
class Quality:
    """Areas under accuracy over hand-over rate."""

    router: str
    """A signal, "random" or "oracle"."""
    area: float
    """On the rows that the policy was chosen by; of what is learned, by weights learned without the row."""
    checked: float | None
    """On the others; None if there are none."""


@dataclass(frozen=True)
class Calibration:
    """A policy and how good it is."""

    policy: PolicyConfig
    promised: CurvePoint
    """On the rows that it was chosen by."""
    found: CurvePoint | None
    """On the others."""
    scores: list[float]
    """Of the others, with this policy."""
    qualities: list[Quality]
    curves: dict[SignalName, list[CurvePoint]]
    """Of every signal, on the rows that the policy was chosen by."""


def calibrate(
    rows: Sequence[Measured], aim: Aim, signal: SignalName | Literal["auto"], tag: str | None, prices: Prices
) -> Calibration:
    """Choose the signal, if it is to be chosen, and the threshold.

    Args:
        rows: at least one, in any order; half of them, drawn by a fixed seed, choose.
        aim: what the threshold is to reach.
        signal: what confidence is; "auto" takes what has the largest area.
        tag: the edge's answer that hands over by itself.
        prices: that the rows' costs were computed by.

    Raises:
        ShadowtuneError: if no threshold reaches the aim.
    """
    drawn = random.Random(0).sample(list(rows), len(rows))
    chosen, others = drawn[: (len(rows) + 1) // 2], drawn[(len(rows) + 1) // 2 :]
    weights = learn(chosen)
    curves = {name: curve(chosen, _confidences(chosen, name)) for name in SIGNALS}
    best = max(SIGNALS, key=lambda name: area(curves[name])) if signal == "auto" else signal
    promised = choose_threshold(curves[best], aim, len(chosen))
    sure = {name: confidences(others, name, weights) for name in SIGNALS}
    qualities = [
        Quality(name, area(curves[name]), area(curve(others, sure[name])) if others else None) for name in SIGNALS
    ]
    qualities += [
        Quality(name, measure(chosen), measure(others) if others else None)
        for name, measure in (("random", random_area), ("oracle", oracle_area))
    ]
    policy = PolicyConfig(
        threshold=promised.threshold,
        signal=best,
        tag=tag,
        weights=weights if best == "learned" else None,
        prices=prices,
        curve=thinned(curves[best], promised),
    )
    over = [level < promised.threshold for level in sure[best]]
    scores = [row.cloud_score if asked else row.edge_score for row, asked in zip(others, over, strict=True)]
    found = at_threshold(others, sure[best], promised.threshold) if others else None
    return Calibration(policy, promised, found, scores, qualities, curves)


def _confidences(rows: Sequence[Measured], signal: SignalName) -> list[float]:
    return held_out_confidences(rows) if signal == "learned" else confidences(rows, signal)
