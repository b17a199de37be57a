"""From an edge's whole answer to who answers: pure functions of text and signals."""

import math
from dataclasses import dataclass

from shadowtune.config.policy import PolicyConfig, SignalName, Weights
from shadowtune.serving.edge.signals import Signals

CLEAREST = 1e-6
"""Signals are kept so far from 0 and 1 that their log-odds are finite."""


@dataclass(frozen=True)
class Verdict:
    """What a policy says of an answer."""

    hand_over: bool
    reason: str
    confidence: float


def features(signals: Signals) -> tuple[float, float, float, float, float]:
    """Return what ``Weights`` weigh, in their order: log-odds of the four signals, logarithm of the length plus one."""
    logprob, margin, entropy, first = map(_log_odds, (signals.logprob, signals.margin, signals.entropy, signals.first))
    return logprob, margin, entropy, first, math.log1p(signals.length)


def learned_confidence(weights: Weights, signals: Signals) -> float:
    """Return the probability of a logistic regression that asking the cloud would not help."""
    of = (weights.logprob, weights.margin, weights.entropy, weights.first, weights.length)
    score = weights.bias + sum(weight * value for weight, value in zip(of, features(signals), strict=True))
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def confidence(signals: Signals, signal: SignalName, weights: Weights | None = None) -> float:
    """Return how sure an answer is by one signal, from 0 to 1."""
    if signal == "learned":
        assert weights is not None
        return learned_confidence(weights, signals)
    return float(vars(signals)[signal])


def is_tag(text: str, tag: str | None) -> bool:
    """Whether an answer hands over by itself, whatever it says behind its tag."""
    return tag is not None and text.strip().startswith(tag)


def judge(policy: PolicyConfig, text: str, signals: Signals) -> Verdict:
    """Decide about a whole answer of the edge."""
    sure = confidence(signals, policy.signal, policy.weights)
    if policy.kind == "always-edge":
        return Verdict(False, "always-edge", sure)
    if policy.kind in ("always-cloud", "verify"):
        return Verdict(True, policy.kind, sure)
    if is_tag(text, policy.tag):
        return Verdict(True, "tag", sure)
    if policy.kind == "tag":
        return Verdict(False, "no tag", sure)
    unsure = sure < policy.threshold
    return Verdict(unsure, "unsure" if unsure else "confident", sure)


def _log_odds(share: float) -> float:
    kept = min(max(share, CLEAREST), 1 - CLEAREST)
    return math.log(kept / (1 - kept))
