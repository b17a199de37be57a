r"""A threshold with a guarantee: the accuracy is at most ``limit`` below the cloud's, with a stated probability.

The loss of a request is max(0, score of the cloud - score of the edge) if the edge keeps it, else 0. It falls as the
threshold rises, and its mean bounds the loss of accuracy. Thresholds are tested from the highest one down, the null
hypothesis being a mean above ``limit``, and the last one before the first that is not rejected at level delta is taken
(risk-controlling prediction sets, Bates et al., 2021, https://arxiv.org/abs/2101.02703, as a fixed sequence of tests:
Angelopoulos et al., 2021, https://arxiv.org/abs/2110.01052). Over the draw of the examples, which must not have chosen
the signal, the mean loss exceeds ``limit`` with probability at most delta.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from shadowtune.config.serving import CurvePoint
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.edge.thresholds import CalibrationExample, deferral_curve


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """Return P(X <= successes) of a binomial X."""
    if successes >= trials or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    terms = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(successes + 1)
    ]
    highest = max(terms)
    return min(1.0, math.exp(highest) * math.fsum(math.exp(term - highest) for term in terms))


def rate_bound(successes: int, trials: int, delta: float) -> float:
    """Return the upper confidence bound of a rate, at level 1 - delta (Clopper and Pearson); 1 without trials."""
    low, high = successes / trials if trials else 1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(successes, trials, middle) > delta else (low, middle)
    return high


def mean_loss_p_value(losses: Sequence[float] | np.ndarray, limit: float) -> float:
    """Return a p-value of the hypothesis that the mean of losses in [0, 1] is above ``limit``.

    Exact for losses of 0 and 1; else the smaller one of Hoeffding's and Bentkus' bounds.

    Args:
        losses: (N,), N > 0, independent.
        limit: above 0 and below 1.
    """
    values = np.asarray(losses, float)
    count, total = len(values), float(values.sum())
    if bool(((values == 0) | (values == 1)).all()):
        return binomial_cdf(round(total), count, limit)
    mean = min(total / count, limit)
    divergence = (1 - mean) * math.log((1 - mean) / (1 - limit)) + (mean * math.log(mean / limit) if mean else 0.0)
    bentkus = math.e * binomial_cdf(math.ceil(total - 1e-9), count, limit)
    return min(1.0, math.exp(-count * divergence), bentkus)


def sufficient_examples(limit: float, delta: float) -> int:
    """Return how many examples without any loss show that the mean loss is at most ``limit``."""
    return math.ceil(math.log(delta) / math.log1p(-limit))


def controlled_threshold(
    examples: Sequence[CalibrationExample], sure: Sequence[float], limit: float, delta: float
) -> CurvePoint:
    """Return the point with the fewest deferrals whose loss of accuracy is controlled.

    Args:
        examples: that chose neither signal nor weights.
        sure: the confidence of each.
        limit: largest mean loss of score, above 0 and below 1.
        delta: probability with which it may be exceeded.

    Raises:
        ShadowtuneError: if the examples are too few for any threshold.
    """
    check_sufficient(len(examples), limit, delta)
    levels = np.asarray(sure, float)
    losses = np.asarray([max(0.0, each.cloud_score - each.edge_score) for each in examples])
    return controlled_point(
        deferral_curve(examples, sure), lambda threshold: np.where(levels >= threshold, losses, 0.0), limit, delta
    )


def check_sufficient(count: int, limit: float, delta: float) -> None:
    """Raise ShadowtuneError if even no loss in so many examples does not show that the mean is at most ``limit``."""
    needed = sufficient_examples(limit, delta)
    if count < needed:
        raise ShadowtuneError(
            f"{count} examples for the threshold are too few to promise a loss of accuracy of at most "
            f"{limit:g} with probability {1 - delta:g}: {2 * needed} examples in all would suffice, half of which "
            "choose the signal"
        )


def controlled_point(
    points: Sequence[CurvePoint], losses_at: Callable[[float], np.ndarray], limit: float, delta: float
) -> CurvePoint:
    """Return the last point, from the highest threshold down, before the first whose loss is not controlled.

    Args:
        points: by rising threshold; the last one defers everything.
        losses_at: from a threshold to the losses (N,) of the examples.
        limit: largest mean loss.
        delta: probability with which it may be exceeded.
    """
    able = [point for point in points if point.threshold >= 0]
    chosen = able[-1]
    for point in reversed(able):
        if mean_loss_p_value(losses_at(point.threshold), limit) > delta:
            break
        chosen = point
    return chosen
