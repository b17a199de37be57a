"""Calibrate deferral in mid-answer on recorded answers: the threshold of single tokens, or the worth of a right token.

An answer of the edge whose tokens have confidences c_1 ... c_n is deferred at the first one below the threshold t. If
the cloud's own answer begins with the tokens before it, the client gets the cloud's answer, else the edge's, and the
cloud's pass is paid for in vain. With the cost model (``PolicyConfig.value``), a token is deferred where
(1 - c_i) V > cost, that is where cost / (1 - c_i) is below V: the same rule with other levels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shadowtune.config.serving import TOKEN_SIGNALS, CurvePoint, PolicyConfig, Prices, SignalName
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.calibration import MINIMUM, Calibration, RouterQuality, draw_halves
from shadowtune.serving.edge.confidence import deferral_cost
from shadowtune.serving.edge.risk import check_sufficient, controlled_point
from shadowtune.serving.edge.thresholds import (
    CalibrationTarget,
    area,
    choose_threshold,
    response_cost,
    thinned,
    threshold_between,
)
from shadowtune.serving.requests import Usage


@dataclass(frozen=True)
class TokenExample:
    """One example that both sides have answered, with the confidence of each token of the edge."""

    token_confidences: Mapping[str, Sequence[float]]
    """By signal, the end token included."""
    edge_score: float
    """From 0 to 1, as the cloud's."""
    cloud_score: float
    agreed: int
    """Tokens with which both answers begin."""
    length: int
    """Tokens of the edge's answer, without its end."""
    cloud_length: int
    """Of the cloud's answer."""
    prompt_tokens: int
    """Of the edge."""
    usage: Usage
    """Of the cloud's answer."""

    @property
    def cloud_helps(self) -> bool:
        """Whether the cloud's answer is better."""
        return self.cloud_score > self.edge_score

    def outcome(self, index: int | None, prices: Prices) -> np.ndarray:
        """Return score, deferral, cost and correction (4,) of a deferral before the token ``index``; None is none."""
        if index is None:
            return np.array([self.edge_score, 0.0, 0.0, 0.0])
        if self.agreed >= min(index, self.length):
            other = self.agreed == index if index < self.length else self.cloud_length > self.length
            return np.array([self.cloud_score, 1.0, response_cost(prices, self.usage), float(other)])
        cost = response_cost(prices, Usage(self.usage.prompt_tokens, index))
        return np.array([self.edge_score, 1.0, cost, 1.0])


def token_curve(
    examples: Sequence[TokenExample], levels: Sequence[Sequence[float]], prices: Prices
) -> list[CurvePoint]:
    """Return accuracy, deferral rate and cost of every threshold that makes a difference, by rising threshold.

    Args:
        examples: at least one.
        levels: of the tokens of each; an answer is deferred at its first token whose level is below the threshold.
        prices: of the cloud.
    """
    total = sum((each.outcome(None, prices) for each in examples), np.zeros(4))
    changes = []
    for each, sure in zip(examples, levels, strict=True):
        before = each.outcome(None, prices)
        for index in reversed(_new_minima(sure)):
            after = each.outcome(index, prices)
            changes.append((sure[index], after - before))
            before = after
    changes.sort(key=lambda change: change[0])
    heights = np.array([level for level, _ in changes])
    sums = np.cumsum([total, *(change for _, change in changes)], axis=0) / len(examples)
    starts = [0, *(np.flatnonzero(np.diff(heights)) + 1).tolist(), *([len(heights)] if len(heights) else [])]
    return [
        CurvePoint(threshold_between(heights, start) if len(heights) else 0.0, *sums[start].tolist())
        for start in starts
    ]


def token_levels(
    examples: Sequence[TokenExample], signal: SignalName, policy: PolicyConfig, by_value: bool
) -> list[list[float]]:
    """Return the levels of the tokens of each example: their confidences or, ``by_value``, cost / (1 - confidence).

    Args:
        examples: whose edge has the signal.
        signal: one of ``TOKEN_SIGNALS``.
        policy: with the prices and ``answer_tokens`` of the cost model.
        by_value: whether the policy has a ``value``.
    """
    found = []
    for each in examples:
        sure = each.token_confidences[signal]
        cost = deferral_cost(policy, each.prompt_tokens)
        found.append([cost / max(1 - level, 1e-12) for level in sure] if by_value else list(sure))
    return found


def calibrate_tokens(
    examples: Sequence[TokenExample],
    target: CalibrationTarget,
    signal: SignalName | Literal["auto"],
    prices: Prices,
    by_value: bool = False,
    minimum: int = MINIMUM,
) -> Calibration:
    """Choose threshold (or worth of a token) and signal, and check them on held-out examples.

    Args:
        examples: at least one, in any order.
        target: of the threshold.
        signal: one of ``TOKEN_SIGNALS``, or "auto", which takes that with the largest area.
        prices: of the cloud.
        by_value: choose ``PolicyConfig.value`` in place of the threshold.
        minimum: least examples of either kind in each half.

    Raises:
        ShadowtuneError: if no threshold reaches the target, or the examples are too few to choose one.
        ConfigError: if the edge has no such signal of tokens.
    """
    signals = [name for name in TOKEN_SIGNALS if all(name in each.token_confidences for each in examples)]
    if signal != "auto" and signal not in signals:
        raise ConfigError(f"policy kind token has no signal {signal} of this edge; take one of {', '.join(signals)}")
    chosen, others = draw_halves(examples, minimum)
    answer_tokens = max(1, round(float(np.mean([each.usage.completion_tokens for each in chosen]))))
    model = PolicyConfig(kind="token", prices=prices, answer_tokens=answer_tokens)
    curves = {name: token_curve(chosen, token_levels(chosen, name, model, by_value), prices) for name in signals}
    best = max(signals, key=lambda name: area(curves[name])) if signal == "auto" else signal
    levels = token_levels(others, best, model, by_value)
    guaranteed = target.kind == "accuracy-loss"
    if guaranteed:
        delta = 1 - target.confidence
        check_sufficient(len(others), target.value, delta)
        curve = token_curve(others, levels, prices)

        def losses_at(threshold: float) -> np.ndarray:
            scores = _outcomes(others, levels, threshold, prices)[:, 0]
            return np.maximum(0.0, [each.cloud_score for each in others] - scores)

        promised = controlled_point(curve, losses_at, target.value, delta)
    else:
        curve = curves[best]
        promised = choose_threshold(curve, target, len(chosen))
    checked = _outcomes(others, levels, promised.threshold, prices)
    found = CurvePoint(promised.threshold, *checked.mean(0).tolist()) if others and not guaranteed else None
    if by_value:
        policy = PolicyConfig(
            kind="token",
            signal=best,
            prices=prices,
            value=max(promised.threshold, 1e-9),
            answer_tokens=answer_tokens,
            examples=len(chosen),
        )
    else:
        policy = PolicyConfig(
            kind="token",
            threshold=promised.threshold,
            signal=best,
            prices=prices,
            curve=thinned(curve, promised),
            examples=len(others if guaranteed else chosen),
        )
    qualities = [RouterQuality(name, area(curve), None) for name, curve in curves.items()]
    return Calibration(policy, promised, found, checked[:, 0].tolist(), qualities, curves)


def _outcomes(
    examples: Sequence[TokenExample], levels: Sequence[Sequence[float]], threshold: float, prices: Prices
) -> np.ndarray:
    """Return the outcome (N, 4) of each example at a threshold."""
    rows = []
    for each, sure in zip(examples, levels, strict=True):
        index = next((index for index, level in enumerate(sure) if level < threshold), None)
        rows.append(each.outcome(index, prices))
    return np.array(rows).reshape(-1, 4)


def _new_minima(levels: Sequence[float]) -> list[int]:
    """Return the positions whose level is below all earlier ones, the only ones at which a threshold can defer."""
    found, lowest = [], math.inf
    for index, level in enumerate(levels):
        if level < lowest:
            found.append(index)
            lowest = level
    return found
