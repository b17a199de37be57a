"""Confidence of an answer out of the probabilities of its tokens, and the decision whether to defer it to the cloud.

    logprob = exp(1/n sum log p_i)        geometric mean probability of the chosen tokens
    margin  = min_i (p_i^(1) - p_i^(2))   smallest difference between the two most likely tokens
    entropy = 1 - 1/n sum H_i / log V     1 is certain, 0 is uniform
    first   = p_1                         probability of the first token
    learned = sigmoid(b + w · x)          x = log-odds of the four above, log(1 + n), log-odds of the two below
    agreement = prod_i (1 - sigmoid(a_i)) probability that the attached model would generate the same tokens
    deferral = 1 - sigmoid(1/n sum b_i)   1 - probability that the attached model is right where this answer is wrong

a_i and b_i are the log-odds of the deferral head (``core.deferral_head``), where the model has one.
The end-of-text token is one of the n tokens: where a label may go on, not going on is a part of the answer. All
probabilities are the model's own, before temperature and the rest of the sampling.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from shadowtune.config.serving import TOKEN_SIGNALS, PolicyConfig, SignalName, Weights
from shadowtune.core.deferral_head import DeferralHead, answer_log_odds, log_agreement

EPSILON = 1e-6
"""Distance from 0 and 1 to which signals are clipped, for finite log-odds."""


@dataclass(frozen=True)
class Signals:
    """Confidence signals of one answer: each from 0 to 1, higher is more confident."""

    logprob: float
    margin: float
    entropy: float
    first: float
    length: int
    """Tokens of the answer, with the one that ends it."""
    agreement: float | None = None
    """None without a deferral head, as ``deferral``."""
    deferral: float | None = None


NO_SIGNALS = Signals(0.0, 0.0, 0.0, 0.0, 0)
"""Signals of an answer without tokens."""


@dataclass(frozen=True)
class TokenStatistics:
    """Probabilities around a chosen token."""

    id: int
    logprob: float
    """Natural logarithm of its probability."""
    margin: float
    """Probability of the most likely token minus that of the second."""
    entropy: float
    """Divided by its largest value, log V."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids and their log-probabilities, best first."""
    deferral: tuple[float, float] | None = None
    """The deferral head's two log-odds; None without a head."""


def statistics_from_logits(logits: Tensor, token: int, top: int) -> TokenStatistics:
    """Return the statistics of a token chosen by raw logits (V,), with ``top`` alternatives."""
    logs = logits.float().log_softmax(-1)
    values, ids = logs.topk(min(max(top, 2), len(logs)))
    likely = list(zip(ids.tolist(), values.tolist(), strict=True))
    entropy = float(torch.special.entr(logs.exp()).sum())
    return TokenStatistics(
        token, float(logs[token]), _margin(likely), _normalized(entropy, len(logs)), tuple(likely[:top])
    )


def statistics_from_top(
    token: int, logprob: float, likely: Sequence[tuple[int, float]], vocabulary: int, top: int
) -> TokenStatistics:
    """Return the statistics of a token of which only the most likely alternatives are known, best first.

    The rest of the probability is taken as uniform over the other tokens, which gives the largest possible entropy.
    """
    entropy = -sum(math.exp(log) * log for _, log in likely if log > -math.inf)
    rest, others = 1 - sum(math.exp(log) for _, log in likely), vocabulary - len(likely)
    if rest > 0 and others > 0:
        entropy -= rest * math.log(rest / others)
    return TokenStatistics(token, logprob, _margin(likely), _normalized(entropy, vocabulary), tuple(likely[:top]))


def with_deferral(
    token: TokenStatistics, state_logits: tuple[float, float] | None, head: DeferralHead | None
) -> TokenStatistics:
    """Return the statistics with the head's log-odds; unchanged without a head.

    Args:
        token: the chosen token.
        state_logits: W s + c, as the runtime gives it.
        head: the runtime's.
    """
    if state_logits is None or head is None:
        return token
    statistics = torch.tensor([token.logprob, token.margin, token.entropy])
    differs, helps = head.with_statistics(torch.tensor(state_logits), statistics).tolist()
    return replace(token, deferral=(differs, helps))


def signals_of(tokens: Sequence[TokenStatistics]) -> Signals:
    """Combine the statistics of an answer's tokens."""
    if not tokens:
        return NO_SIGNALS
    known = [token.deferral for token in tokens if token.deferral is not None]
    agreement = deferral = None
    if len(known) == len(tokens):
        logits = torch.tensor(known)
        agreement = float(log_agreement(logits).exp())
        deferral = float(1 - answer_log_odds(logits).sigmoid())
    return Signals(
        logprob=math.exp(min(0.0, statistics.fmean(token.logprob for token in tokens))),
        margin=min(token.margin for token in tokens),
        entropy=1 - statistics.fmean(token.entropy for token in tokens),
        first=math.exp(min(0.0, tokens[0].logprob)),
        length=len(tokens),
        agreement=agreement,
        deferral=deferral,
    )


def features(signals: Signals) -> tuple[float, ...]:
    """Return the inputs of the learned router in the order of ``Weights``, log-odds and log(1 + length).

    Those of the deferral head are 0 without one.
    """
    four = map(_log_odds, (signals.logprob, signals.margin, signals.entropy, signals.first))
    two = (0.0 if share is None else _log_odds(share) for share in (signals.agreement, signals.deferral))
    return (*four, math.log1p(signals.length), *two)


def learned_confidence(weights: Weights, signals: Signals) -> float:
    """Return the learned router's probability that the cloud's answer would not be better."""
    _, *factors = astuple(weights)
    score = weights.bias + sum(weight * value for weight, value in zip(factors, features(signals), strict=True))
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def confidence(signals: Signals, signal: SignalName, weights: Weights | None = None) -> float:
    """Return the confidence of an answer by one signal, from 0 to 1; 0 for a signal that the edge could not compute."""
    if signal == "learned":
        assert weights is not None
        return learned_confidence(weights, signals)
    return float(vars(signals)[signal] or 0.0)


def token_confidence(token: TokenStatistics, signal: SignalName) -> float:
    """Return the confidence of one token by one of ``TOKEN_SIGNALS``, from 0 to 1; 0 if it is not known."""
    assert signal in TOKEN_SIGNALS
    if signal == "agreement":
        return 0.0 if token.deferral is None else 1 / (1 + math.exp(min(token.deferral[0], 700.0)))
    if signal == "margin":
        return token.margin
    return 1 - token.entropy if signal == "entropy" else math.exp(min(0.0, token.logprob))


def token_threshold(policy: PolicyConfig, prompt_tokens: int) -> float:
    """Return the confidence below which a token is deferred, by a policy of kind "token".

    With ``value`` it is that at which the expected gain of asking the cloud, (1 - confidence) value, equals the cost.

    Args:
        policy: the policy.
        prompt_tokens: number of the prompt's tokens.
    """
    if policy.value is None:
        return policy.threshold
    return max(0.0, 1 - deferral_cost(policy, prompt_tokens) / policy.value)


def deferral_cost(policy: PolicyConfig, prompt_tokens: int) -> float:
    """Return what the cloud is expected to cost for a prompt of so many tokens and ``answer_tokens``."""
    prices = policy.prices
    return prices.request + prices.prompt * prompt_tokens + prices.completion * policy.answer_tokens


@dataclass(frozen=True)
class PolicyDecision:
    """Whether a policy defers an answer to the cloud."""

    defer: bool
    reason: str
    confidence: float


def has_tag(text: str, tag: str | None) -> bool:
    """Whether an answer begins with the tag by which the model itself defers to the cloud."""
    return tag is not None and text.strip().startswith(tag)


def decide(policy: PolicyConfig, text: str, signals: Signals) -> PolicyDecision:
    """Decide whether to defer a complete answer of the edge."""
    sure = confidence(signals, policy.signal, policy.weights)
    if policy.kind == "always-edge":
        return PolicyDecision(False, "always-edge", sure)
    if policy.kind in ("always-cloud", "verify"):
        return PolicyDecision(True, policy.kind, sure)
    if has_tag(text, policy.tag):
        return PolicyDecision(True, "tag", sure)
    if policy.kind == "tag":
        return PolicyDecision(False, "no tag", sure)
    unsure = sure < policy.threshold
    return PolicyDecision(unsure, "unsure" if unsure else "confident", sure)


def _margin(likely: Sequence[tuple[int, float]]) -> float:
    first, second = (*(math.exp(log) for _, log in likely[:2]), 0.0)[:2]
    return max(0.0, first - second)


def _normalized(entropy: float, vocabulary: int) -> float:
    return min(1.0, max(0.0, entropy / math.log(vocabulary))) if vocabulary > 1 else 0.0


def _log_odds(share: float) -> float:
    kept = min(max(share, EPSILON), 1 - EPSILON)
    return math.log(kept / (1 - kept))
