import math

import pytest

from shadowtune.config.policy import PolicyConfig, Weights
from shadowtune.serving.edge.policies import confidence, is_tag, judge, learned_confidence
from shadowtune.serving.edge.signals import NOTHING, Signals

SIGNALS = Signals(0.8, 0.1, 0.6, 0.9, 3)


@pytest.mark.parametrize(("signal", "sure"), [("logprob", 0.8), ("margin", 0.1), ("entropy", 0.6), ("first", 0.9)])
def test_each_signal_decides_by_its_own_number(signal, sure):
    for threshold, over in ((sure, False), (math.nextafter(sure, 2), True)):
        verdict = judge(PolicyConfig(threshold=threshold, signal=signal), "words", SIGNALS)
        assert (verdict.hand_over, verdict.confidence) == (over, sure)
        assert verdict.reason == ("unsure" if over else "confident")


def test_the_learned_confidence_is_a_logistic_regression_of_log_odds_and_length():
    weights = Weights(0.5, 1.0, 0.0, 0.0, 0.0, -2.0)
    expected = 1 / (1 + math.exp(-(0.5 + math.log(0.8 / 0.2) - 2 * math.log(4))))
    assert learned_confidence(weights, SIGNALS) == pytest.approx(expected)
    assert confidence(SIGNALS, "learned", weights) == pytest.approx(expected)


@pytest.mark.parametrize("factor", [1e6, -1e6])
def test_the_learned_confidence_of_extremes_is_a_probability(factor):
    weights = Weights(0.0, factor, factor, factor, factor, factor)
    assert 0 <= learned_confidence(weights, Signals(1.0, 1.0, 1.0, 1.0, 100)) <= 1
    assert 0 <= learned_confidence(weights, NOTHING) <= 1


@pytest.mark.parametrize(
    ("text", "tag", "found"),
    [
        ("[REMOTE]", "[REMOTE]", True),
        (" [REMOTE]\nx", "[REMOTE]", True),
        ("not [REMOTE]", "[REMOTE]", False),
        ("", None, False),
    ],
)
def test_a_tag_begins_the_answer(text, tag, found):
    assert is_tag(text, tag) == found


@pytest.mark.parametrize(
    ("kind", "text", "over", "reason"),
    [
        ("always-edge", "[REMOTE]", False, "always-edge"),
        ("always-cloud", "words", True, "always-cloud"),
        ("verify", "words", True, "verify"),
        ("tag", "[REMOTE]", True, "tag"),
        ("tag", "words", False, "no tag"),
        ("confidence", "[REMOTE]", True, "tag"),
        ("confidence", "words", False, "confident"),
    ],
)
def test_each_kind_decides_in_its_way(kind, text, over, reason):
    verdict = judge(PolicyConfig(kind=kind, threshold=0.0), text, SIGNALS)
    assert (verdict.hand_over, verdict.reason) == (over, reason)
