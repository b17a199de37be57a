"""How sure a model was of its answer, from the probabilities of the answer's tokens.

    logprob = exp(1/n sum log p_i)        the geometric mean probability of the tokens said
    margin  = min_i (p_i^(1) - p_i^(2))   the smallest distance of the two likeliest tokens
    entropy = 1 - 1/n sum H_i / log V     1 is certain, 0 is every token being as likely
    first   = p_1                         the probability of the first token

The token that ends an answer is one of its tokens: where a label may go on, not going on is a part of it. All are of
the model's own probabilities, before temperature and the rest of the sampling.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """How sure a model was of one answer: each from 0 to 1, higher is surer."""

    logprob: float
    margin: float
    entropy: float
    first: float
    length: int
    """Tokens of the answer, the one that ends it included."""


NOTHING = Signals(0.0, 0.0, 0.0, 0.0, 0)
"""Of an answer without tokens."""


@dataclass(frozen=True)
class Chosen:
    """A token that was said, and what else was likely."""

    id: int
    logprob: float
    """Natural logarithm of its probability."""
    margin: float
    """Probability of the likeliest token less that of the second."""
    entropy: float
    """Over its largest value, log V."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids and their logarithms, best first."""


def read_logits(logits: Tensor, token: int, top: int) -> Chosen:
    """Tell of a token by the raw logits (V,) that it was chosen by; ``top`` alternatives are kept."""
    logs = logits.float().log_softmax(-1)
    values, ids = logs.topk(min(max(top, 2), len(logs)))
    likely = list(zip(ids.tolist(), values.tolist(), strict=True))
    entropy = float(torch.special.entr(logs.exp()).sum())
    return Chosen(token, float(logs[token]), _margin(likely), _share(entropy, len(logs)), tuple(likely[:top]))


def read_likely(token: int, logprob: float, likely: Sequence[tuple[int, float]], vocabulary: int, top: int) -> Chosen:
    """Tell of a token by the likeliest ones alone, best first.

    What is left of the probability is taken to be spread evenly over the other tokens, which makes the entropy the
    largest that is possible.
    """
    entropy = -sum(math.exp(log) * log for _, log in likely if log > -math.inf)
    rest, others = 1 - sum(math.exp(log) for _, log in likely), vocabulary - len(likely)
    if rest > 0 and others > 0:
        entropy -= rest * math.log(rest / others)
    return Chosen(token, logprob, _margin(likely), _share(entropy, vocabulary), tuple(likely[:top]))


def signals_of(tokens: Sequence[Chosen]) -> Signals:
    """Put the tokens of one answer together."""
    if not tokens:
        return NOTHING
    return Signals(
        logprob=math.exp(min(0.0, statistics.fmean(token.logprob for token in tokens))),
        margin=min(token.margin for token in tokens),
        entropy=1 - statistics.fmean(token.entropy for token in tokens),
        first=math.exp(min(0.0, tokens[0].logprob)),
        length=len(tokens),
    )


def _margin(likely: Sequence[tuple[int, float]]) -> float:
    first, second = (*(math.exp(log) for _, log in likely[:2]), 0.0)[:2]
    return max(0.0, first - second)


def _share(entropy: float, vocabulary: int) -> float:
    return min(1.0, max(0.0, entropy / math.log(vocabulary))) if vocabulary > 1 else 0.0
