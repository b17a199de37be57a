"""Metrics of probabilities and confidences against binary labels: AUROC, expected calibration error, reliability."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10
"""Bins of equal width between 0 and 1."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The examples whose confidence lies in one bin."""

    confidence: float
    """Their mean confidence."""
    accuracy: float
    """Their share with label 1."""
    count: int


def auroc(scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a positive example has the higher score, ties halved.

    Args:
        scores: (N,), higher for positive examples.
        labels: (N,), 0 or 1.

    Returns:
        0.5 if all labels are equal, when the area is undefined.
    """
    values, positive = np.asarray(scores, float), np.asarray(labels) > 0.5
    count = int(positive.sum())
    if count in (0, len(values)):
        return 0.5
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks = (last - (sizes - 1) / 2)[inverse]  # the mean rank of equal scores, from 1
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(values) - count)))


def reliability(
    confidences: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> list[ReliabilityBin]:
    """Return the bins that have examples, by rising confidence.

    Args:
        confidences: (N,), 0 to 1.
        labels: (N,), 0 to 1; fractions are means of several labels.
    """
    sure, right = np.asarray(confidences, float), np.asarray(labels, float)
    numbers = np.minimum((sure * BINS).astype(int), BINS - 1)
    chosen = [numbers == number for number in range(BINS)]
    return [
        ReliabilityBin(float(sure[each].mean()), float(right[each].mean()), int(each.sum()))
        for each in chosen
        if each.any()
    ]


def expected_calibration_error(
    confidences: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> float:
    """Return the mean distance of confidence and accuracy over the bins of ``reliability``, weighted by their counts.

    Guo et al., 2017, https://arxiv.org/abs/1706.04599, Eq. 5. Arguments as for ``reliability``; 0 without examples.
    """
    bins = reliability(confidences, labels) if len(confidences) else []
    count = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / max(count, 1)


def isotonic_fit(
    confidences: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the rising step function with the least squared error, by pooling adjacent violators.

    Barlow and Brunk, 1972. Confidences that are equal get one value, however the examples are ordered.

    Args:
        confidences: (N,), N > 0.
        labels: (N,), 0 to 1.

    Returns:
        Different confidences (K,), rising, and the calibrated value (K,) of each.
    """
    levels, inverse, counts = np.unique(np.asarray(confidences, float), return_inverse=True, return_counts=True)
    means = np.bincount(inverse, np.asarray(labels, float)) / counts
    pooled: list[tuple[float, int, int]] = []  # mean, examples, levels
    for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
        width = 1
        while pooled and pooled[-1][0] >= mean:
            other, others, more = pooled.pop()
            mean = (mean * count + other * others) / (count + others)
            count, width = count + others, width + more
        pooled.append((mean, count, width))
    return levels, np.repeat([mean for mean, _, _ in pooled], [width for _, _, width in pooled])


def isotonic_values(fitted: tuple[np.ndarray, np.ndarray], confidences: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the calibrated value (N,) of each confidence (N,), linear between those of the fit and constant beyond."""
    return np.asarray(np.interp(np.asarray(confidences, float), *fitted))
