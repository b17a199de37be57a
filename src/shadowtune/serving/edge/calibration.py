"""Calibrate a routing policy on examples that both sides have answered: one half chooses it, the other half checks it.

The learned router is a logistic regression: the probability that the cloud's answer would not be better.
"""

import bisect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch

from shadowtune.config.serving import (
    HEAD_SIGNALS,
    CurvePoint,
    PolicyConfig,
    Prices,
    ReliabilityPoint,
    SignalName,
    Weights,
)
from shadowtune.core.calibration_metrics import (
    auroc,
    expected_calibration_error,
    isotonic_fit,
    isotonic_values,
    reliability,
)
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.serving.edge.confidence import features, learned_confidence
from shadowtune.serving.edge.risk import binomial_cdf, controlled_threshold
from shadowtune.serving.edge.thresholds import (
    ALWAYS,
    CalibrationExample,
    CalibrationTarget,
    area,
    area_of,
    at_threshold,
    choose_threshold,
    confidences,
    deferral_curve,
    oracle_area,
    random_area,
    thinned,
)
from shadowtune.tables import keep_within, line_style

SIGNALS: tuple[SignalName, ...] = get_args(SignalName)
"""Signals of an edge with a deferral head."""
PLAIN_SIGNALS = tuple(name for name in SIGNALS if name not in HEAD_SIGNALS)
"""Signals of any edge."""
FOLDS = 5
MINIMUM = 5
"""Least examples that the cloud answers better, and that it does not, in each half."""
RESAMPLES = 300
"""Of a bootstrap."""
WEIGHT_DECAY = 1e-2
"""On the squared weights of standardized features; keeps them finite where the examples are separable."""


@dataclass(frozen=True)
class BootstrapInterval:
    """An estimate with its 95 % interval, by resampling the examples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the three numbers in a few words."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class HasOutcome(Protocol):
    """An example that both sides have answered."""

    @property
    def cloud_helps(self) -> bool:
        """Whether the cloud's answer is better."""
        ...


Example = TypeVar("Example", bound=HasOutcome)


@dataclass(frozen=True)
class RouterQuality:
    """How well a router tells which requests to defer."""

    router: str
    """A signal, "random" or "oracle"."""
    area: float
    """Under accuracy over deferral rate, on the half that chose the policy; of the learned router out of fold."""
    checked: BootstrapInterval | None
    """The same on the other half; None if it is empty."""
    auroc: BootstrapInterval | None = None
    """Of "the cloud's answer is better" on the other half: 0.5 is chance."""
    calibration_error: BootstrapInterval | None = None
    """Expected calibration error of the confidence, as the probability that the cloud's answer is not better, on the
    other half."""
    isotonic_error: BootstrapInterval | None = None
    """The same after an isotonic regression that was fitted to the half that chose the policy."""
    gap_share: BootstrapInterval | None = None
    """Share of the way from the area of random deferral to the oracle's, on the other half; None if these are equal."""


@dataclass(frozen=True)
class Calibration:
    """A policy and its quality."""

    policy: PolicyConfig
    promised: CurvePoint
    """Of the chosen threshold, on the half that chose it."""
    found: CurvePoint | None
    """Of the chosen threshold, on the other half; None if it is empty, or chose the threshold."""
    scores: list[float]
    """Of each example of the other half, with this policy."""
    qualities: list[RouterQuality]
    curves: dict[SignalName, list[CurvePoint]]
    """Of every signal, on the half that chose the policy."""


def calibrate(
    examples: Sequence[CalibrationExample],
    target: CalibrationTarget,
    signal: SignalName | Literal["auto"],
    tag: str | None,
    prices: Prices,
    minimum: int = MINIMUM,
) -> Calibration:
    """Choose threshold and signal, and check them on held-out examples.

    Args:
        examples: at least one, in any order; half of them, drawn with a fixed seed, choose. For a guaranteed loss of
            accuracy that half chooses the signal alone, and the other one the threshold.
        target: of the threshold.
        signal: the confidence; "auto" takes the signal with the largest area.
        tag: the answer by which the edge's model itself defers.
        prices: by which the costs of the examples were computed.
        minimum: least examples of either kind in each half; see ``check_examples``.

    Raises:
        ShadowtuneError: if no threshold reaches the target, or the examples are too few to choose one.
    """
    chosen, others = draw_halves(examples, minimum)
    signals = available_signals(examples)
    if signal != "auto" and signal not in signals:
        raise ConfigError(
            f"signal {signal} needs a deferral head, which this edge has none of; train with deferral_fraction, or "
            f"take one of {', '.join(signals)}"
        )
    weights = fit_learned_router(chosen)
    levels = {
        name: out_of_fold_confidences(chosen) if name == "learned" else confidences(chosen, name) for name in signals
    }
    curves = {name: deferral_curve(chosen, sure) for name, sure in levels.items()}
    best = max(signals, key=lambda name: area(curves[name])) if signal == "auto" else signal
    checks = {name: confidences(others, name, weights) for name in signals}
    guaranteed = target.kind == "accuracy-loss"
    if guaranteed:
        promised = controlled_threshold(others, checks[best], target.value, 1 - target.confidence)
        curve = deferral_curve(others, checks[best])
    else:
        promised, curve = choose_threshold(curves[best], target, len(chosen)), curves[best]
    policy = PolicyConfig(
        threshold=promised.threshold,
        signal=best,
        tag=tag,
        weights=weights if best == "learned" else None,
        prices=prices,
        curve=thinned(curve, promised),
        examples=len(others if guaranteed else chosen),
        reliability=_reliability(others, checks[best]),
    )
    scores = [
        each.cloud_score if level < promised.threshold else each.edge_score
        for each, level in zip(others, checks[best], strict=True)
    ]
    found = at_threshold(others, checks[best], promised.threshold) if others and not guaranteed else None
    return Calibration(policy, promised, found, scores, _qualities(chosen, others, curves, levels, checks), curves)


def draw_halves(examples: Sequence[Example], minimum: int) -> tuple[list[Example], list[Example]]:
    """Return the half that chooses and the half that checks, drawn with a fixed seed.

    Raises:
        ShadowtuneError: as ``check_examples``.
    """
    drawn = random.Random(0).sample(list(examples), len(examples))
    half = (len(examples) + 1) // 2
    check_examples(drawn[:half], drawn[half:], minimum)
    return drawn[:half], drawn[half:]


def check_examples(chosen: Sequence[HasOutcome], others: Sequence[HasOutcome], minimum: int) -> None:
    """Raise ShadowtuneError if a half holds too few examples of a kind to choose a threshold, or to check one.

    Args:
        chosen: examples of the half that chooses.
        others: of the half that checks.
        minimum: least examples that the cloud answers better, and that it does not, in each half.
    """
    halves = (chosen, others)
    count, helped = len(chosen) + len(others), [sum(each.cloud_helps for each in half) for half in halves]
    rest = [len(half) - number for half, number in zip(halves, helped, strict=True)]
    kinds = ((helped, "better", "always-edge"), (rest, "no better", "always-cloud"))
    for numbers, words, policy in kinds:
        if min(numbers) < minimum:
            enough = _sufficient(sum(numbers) / count or 0.5 / (count + 1), minimum)
            raise ShadowtuneError(
                f"the cloud's answer is {words} in {sum(numbers)} of {count} examples, {numbers[0]} in the half that "
                f"chooses a threshold and {numbers[1]} in the half that checks it, of at least {minimum} in each: "
                f"about {enough} examples would suffice at this rate; name more, lower --minimum, or serve with "
                f"--policy-kind {policy}"
            )


def _sufficient(rate: float, minimum: int) -> int:
    """Return how many examples have, with a probability of 0.975 for each half, ``minimum`` of a kind there.

    Args:
        rate: of the kind, above 0.
        minimum: at least 1.
    """

    def holds(half: int) -> bool:
        return half >= minimum and binomial_cdf(minimum - 1, half, rate) <= 0.025

    high = minimum
    while not holds(high):
        high *= 2
    return 2 * bisect.bisect_left(range(high + 1), True, key=holds)


def _qualities(
    chosen: Sequence[CalibrationExample],
    others: Sequence[CalibrationExample],
    curves: Mapping[SignalName, Sequence[CurvePoint]],
    levels: Mapping[SignalName, Sequence[float]],
    checks: Mapping[SignalName, Sequence[float]],
) -> list[RouterQuality]:
    """Return the quality of each signal, of random deferral and of the oracle.

    Args:
        chosen: examples of the half that chose the policy.
        others: of the other half.
        curves: of each signal on ``chosen``.
        levels: confidences of ``chosen``.
        checks: confidences of ``others``.
    """
    areas: dict[str, float] = {name: area(curve) for name, curve in curves.items()}
    areas |= {"random": random_area(chosen), "oracle": oracle_area(chosen)}
    if not others:
        return [RouterQuality(name, value, None) for name, value in areas.items()]
    edge, cloud = (np.asarray([vars(each)[f"{side}_score"] for each in others], float) for side in ("edge", "cloud"))
    helps = (cloud > edge).astype(float)
    kept = [float(not each.cloud_helps) for each in chosen]
    found = []
    for name in checks:
        sure = np.asarray(checks[name], float)
        isotonic = isotonic_values(isotonic_fit(levels[name], kept), sure)

        def area_at(rows: np.ndarray, sure: np.ndarray = sure) -> float:
            return area_of(sure[rows], edge[rows], cloud[rows])

        def gap_at(rows: np.ndarray, sure: np.ndarray = sure) -> float:
            return _gap_share(sure[rows], edge[rows], cloud[rows])

        def auroc_at(rows: np.ndarray, sure: np.ndarray = sure) -> float:
            return auroc(-sure[rows], helps[rows])

        def error_at(rows: np.ndarray, sure: np.ndarray = sure) -> float:
            return expected_calibration_error(np.clip(sure[rows], 0.0, 1.0), 1 - helps[rows])

        checked, separation, error = (_bootstrap(measure, len(others)) for measure in (area_at, auroc_at, error_at))
        corrected = _bootstrap(partial(error_at, sure=isotonic), len(others))
        gap = _bootstrap(gap_at, len(others)) if bool((edge != cloud).any()) else None
        found.append(RouterQuality(name, areas[name], checked, separation, error, corrected, gap))
    bounds: dict[str, Callable[[np.ndarray], float]] = {
        "random": lambda rows: float((edge[rows] + cloud[rows]).mean() / 2),
        "oracle": lambda rows: area_of((edge - cloud)[rows], edge[rows], cloud[rows]),
    }
    found += [RouterQuality(name, areas[name], _bootstrap(bound, len(others))) for name, bound in bounds.items()]
    return found


def _gap_share(sure: np.ndarray, edge: np.ndarray, cloud: np.ndarray) -> float:
    """Return how far an area is from random deferral's to the oracle's; 0 if no order of examples differs."""
    chance, best = float((edge + cloud).mean() / 2), area_of(edge - cloud, edge, cloud)
    return (area_of(sure, edge, cloud) - chance) / (best - chance) if best - chance > 1e-12 else 0.0


def _bootstrap(measure: Callable[[np.ndarray], float], count: int) -> BootstrapInterval:
    """Estimate a measure, a function of the numbers of the examples to use, with its percentile interval."""
    rng = np.random.default_rng(0)
    drawn = [measure(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return BootstrapInterval(measure(np.arange(count)), float(low), float(high))


def _reliability(examples: Sequence[CalibrationExample], sure: Sequence[float]) -> tuple[ReliabilityPoint, ...]:
    if not examples:
        return ()
    bins = reliability(np.clip(np.asarray(sure, float), 0.0, 1.0), [not each.cloud_helps for each in examples])
    return tuple(ReliabilityPoint(each.confidence, each.accuracy, each.count) for each in bins)


def available_signals(examples: Sequence[CalibrationExample]) -> tuple[SignalName, ...]:
    """Return the signals that the edge computed for every example."""
    headless = any(each.signals.agreement is None for each in examples)
    return PLAIN_SIGNALS if headless else SIGNALS


def fit_learned_router(examples: Sequence[CalibrationExample]) -> Weights:
    """Fit the logistic regression; tagged examples, which are always deferred, are left out."""
    used = [each for each in examples if not each.tagged]
    if not used:
        return Weights(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    inputs = torch.tensor([features(each.signals) for each in used], dtype=torch.float64)
    labels = torch.tensor([float(each.edge_score >= each.cloud_score) for each in used], dtype=torch.float64)
    mean, spread = inputs.mean(0), inputs.std(0, correction=0)
    spread = torch.where(spread < 1e-9, torch.ones_like(spread), spread)  # a constant feature
    standardized = (inputs - mean) / spread
    weights = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = weights[0] + standardized @ weights[1:]
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        value = value + WEIGHT_DECAY * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = weights.detach()
    slopes = fitted[1:] / spread
    return Weights(float(fitted[0] - (slopes * mean).sum()), *slopes.tolist())


def out_of_fold_confidences(examples: Sequence[CalibrationExample], folds: int = FOLDS) -> list[float]:
    """Return each example's confidence by a router that was fitted without it."""
    folds = min(folds, len(examples))
    if folds < 2:
        fitted = [fit_learned_router(examples)]
    else:
        parts = [[each for number, each in enumerate(examples) if number % folds != fold] for fold in range(folds)]
        fitted = [fit_learned_router(part) for part in parts]
    return [
        ALWAYS if each.tagged else learned_confidence(fitted[number % len(fitted)], each.signals)
        for number, each in enumerate(examples)
    ]


def plot_calibration(figure: Any, calibration: Calibration) -> None:
    """Plot accuracy over deferral rate and over cost into an empty matplotlib figure."""
    rates, costs = figure.subplots(1, 2, sharey=True)
    for name, points in calibration.curves.items():
        chosen = name == calibration.policy.signal
        style = {"linewidth": 2.2 if chosen else 1.0, "alpha": 1.0 if chosen else 0.6, "label": name}
        heights = [100 * point.accuracy for point in points]
        line = line_style(len(points))
        rates.plot([100 * point.deferral_rate for point in points], heights, line, **style)
        costs.plot([point.cost for point in points], heights, line, **style)
    points = calibration.curves[calibration.policy.signal]
    ends = [100 * points[0].accuracy, 100 * points[-1].accuracy]
    for axes, end in ((rates, 100), (costs, points[-1].cost)):
        axes.plot([0, end], ends, ":", color="#888888", label="random")
    for point, marker, label in ((calibration.promised, "o", "chosen"), (calibration.found, "x", "checked")):
        if point is not None:
            rates.plot([100 * point.deferral_rate], [100 * point.accuracy], marker, color="black", label=label)
            costs.plot([point.cost], [100 * point.accuracy], marker, color="black")
    rates.set(title="accuracy over deferral rate", xlabel="requests deferred to the cloud, %", ylabel="accuracy, %")
    costs.set(title="accuracy over cost", xlabel="cost of a request, in cloud tokens")
    for axes in (rates, costs):
        axes.grid(alpha=0.3)
        keep_within(axes.yaxis, 0, 100)
    keep_within(rates.xaxis, 0, 100)
    keep_within(costs.xaxis, 0)
    rates.legend(fontsize="small")
