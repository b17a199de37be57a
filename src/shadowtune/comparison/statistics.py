"""Confidence intervals of means and of differences of means: a bootstrap over examples and seeds.

Scores of a method on a task are a matrix (S, N), S seeds and N examples. A replicate draws N of the examples and S of
the seeds, each with replacement, and takes the mean; the middle 95 % of many replicates is the interval (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13). The same numbers are drawn for every method, so
the difference of two methods' replicates gives the paired interval of the difference.

With S seeds the spread between seeds is underestimated by a factor of sqrt((S - 1) / S); with one seed it is not
included, and the interval is that of one training run.

Where all scores are equal every replicate is the same, and the interval would have no width. It is then the exact one
of a share of 0 or n of n (Clopper and Pearson, 1934); N examples count once whatever S.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPLICATES = 4000
CHUNK = 250
"""Replicates that are drawn at a time, to bound memory."""


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """Outcome of a difference: "better" or "worse" where the interval excludes 0, else "undecided"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


@dataclass(frozen=True)
class BootstrapSample:
    """The mean of scores, with its bootstrap replicates."""

    mean: float
    replicates: Tensor
    """(R,), float64."""
    examples: int = 0
    """N; 0 if it is not known."""
    margin: float = 0.0
    """Half-width added to the interval where the replicates are constant."""
    lowest: float = 0.0
    """Least possible mean; the largest is 1."""

    def minus(self, other: "BootstrapSample") -> "BootstrapSample":
        """Return the difference to another sample, paired where both were drawn with the same stream."""
        mean, replicates = self.mean - other.mean, self.replicates - other.replicates
        examples = min(self.examples, other.examples)
        # of n pairs none differs: at most a share of ``bound`` would; all differ: see a share (d + 1) / 2 of n of n
        margin = _bound(examples) * (1 + abs(mean)) if _is_constant(replicates) else 0.0
        return BootstrapSample(mean, replicates, examples, margin, -1.0)

    def estimate(self) -> MeanEstimate:
        """Return the mean with its 95 % interval."""
        low, high = torch.quantile(self.replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        if self.margin:
            low = max(self.lowest, self.mean - math.hypot(self.mean - low, self.margin))
            high = min(1.0, self.mean + math.hypot(high - self.mean, self.margin))
        return MeanEstimate(self.mean, low, high)


def bootstrap(scores: Tensor, stream: int = 0, replicates: int = REPLICATES) -> BootstrapSample:
    """Draw replicates of a mean.

    Args:
        scores: (S, N), seeds x examples.
        stream: seed of the draws; samples of one stream are paired, those of different streams independent.
        replicates: R, their number.
    """
    scores = scores.to(torch.float64)
    seeds, examples = scores.shape
    for_examples = torch.Generator().manual_seed(2 * stream)
    for_seeds = torch.Generator().manual_seed(2 * stream + 1)  # apart, so that S does not change which examples
    means = []
    for start in range(0, replicates, CHUNK):
        count = min(CHUNK, replicates - start)
        drawn = torch.randint(examples, (count, examples), generator=for_examples)
        times = torch.zeros(count, examples, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn).double()
        )
        by_seed = times @ scores.T / examples
        chosen = torch.randint(seeds, (count, seeds), generator=for_seeds)
        means.append(by_seed.gather(1, chosen).mean(1))
    sample = torch.cat(means)
    return BootstrapSample(float(scores.mean()), sample, examples, _bound(examples) if _is_constant(sample) else 0.0)


def mean_of(samples: Sequence[BootstrapSample]) -> BootstrapSample:
    """Return the mean over tasks, which have equal weights whatever their numbers of examples."""
    return BootstrapSample(
        sum(sample.mean for sample in samples) / len(samples),
        torch.stack([sample.replicates for sample in samples]).mean(0),
        sum(sample.examples for sample in samples),
        math.hypot(*(sample.margin for sample in samples)) / len(samples),
        min(sample.lowest for sample in samples),
    )


def _bound(examples: int) -> float:
    """Return the upper end of the exact 95 % interval of a share of 0 of so many examples."""
    return 1 - 0.025 ** (1 / examples) if examples else 0.0


def _is_constant(replicates: Tensor) -> bool:
    return bool((replicates.max() - replicates.min()) < 1e-12)
