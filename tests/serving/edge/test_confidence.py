import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.config.serving import PolicyConfig, Weights
from shadowtune.serving.edge.confidence import (
    NO_SIGNALS,
    Signals,
    TokenStatistics,
    confidence,
    decide,
    has_tag,
    learned_confidence,
    signals_of,
    statistics_from_logits,
    statistics_from_top,
)
from tests.support.properties import property_test

HALF = math.log(0.5)
SIGNALS = Signals(0.8, 0.1, 0.6, 0.9, 3)


def test_signals_of_hand_made_tokens():
    tokens = [TokenStatistics(1, math.log(0.9), 0.8, 0.1), TokenStatistics(2, math.log(0.4), 0.2, 0.5)]
    signals = signals_of(tokens)
    assert signals.logprob == pytest.approx(math.sqrt(0.9 * 0.4))
    assert (signals.margin, signals.entropy, signals.length) == (0.2, pytest.approx(0.7), 2)
    assert signals.first == pytest.approx(0.9)


def test_an_answer_without_tokens_is_not_sure_of_anything():
    assert signals_of([]) == NO_SIGNALS


def test_a_token_is_told_of_by_its_logits():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3
    token = statistics_from_logits(logits, 1, 2)
    assert token.logprob == pytest.approx(math.log(0.25))
    assert token.margin == pytest.approx(0.25)
    assert token.entropy == pytest.approx(1.75 / 2)
    assert [index for index, _ in token.top] == [0, 1]
    assert statistics_from_logits(logits, 1, 0).top == ()


def test_a_certain_token_has_no_entropy_and_infinite_logits_are_numbers():
    token = statistics_from_logits(torch.tensor([0.0, -math.inf, -math.inf]), 0, 0)
    assert (token.logprob, token.margin, token.entropy) == (0.0, 1.0, 0.0)


@property_test
@given(st.lists(st.floats(-8, 8), min_size=3, max_size=12), st.integers(2, 12))
def test_the_likeliest_alone_tell_the_same_but_for_an_entropy_that_may_be_too_large(logits, known):
    tensor = torch.tensor(logits)
    whole = statistics_from_logits(tensor, 0, len(logits))
    part = statistics_from_top(0, whole.logprob, whole.top[:known], len(logits), 1)
    assert part.margin == pytest.approx(whole.margin)
    assert part.entropy >= whole.entropy - 1e-5
    if known >= len(logits):
        assert part.entropy == pytest.approx(whole.entropy, abs=1e-5)
    assert part.top == whole.top[:1]


def test_one_likely_token_has_a_margin_over_nothing():
    assert statistics_from_top(0, HALF, [(0, HALF)], 2, 0).margin == pytest.approx(0.5)


@pytest.mark.parametrize(("signal", "sure"), [("logprob", 0.8), ("margin", 0.1), ("entropy", 0.6), ("first", 0.9)])
def test_each_signal_decides_by_its_own_number(signal, sure):
    for threshold, over in ((sure, False), (math.nextafter(sure, 2), True)):
        decision = decide(PolicyConfig(threshold=threshold, signal=signal), "words", SIGNALS)
        assert (decision.defer, decision.confidence) == (over, sure)
        assert decision.reason == ("unsure" if over else "confident")


def test_the_learned_confidence_is_a_logistic_regression_of_log_odds_and_length():
    weights = Weights(0.5, 1.0, 0.0, 0.0, 0.0, -2.0)
    expected = 1 / (1 + math.exp(-(0.5 + math.log(0.8 / 0.2) - 2 * math.log(4))))
    assert learned_confidence(weights, SIGNALS) == pytest.approx(expected)
    assert confidence(SIGNALS, "learned", weights) == pytest.approx(expected)


@pytest.mark.parametrize("factor", [1e6, -1e6])
def test_the_learned_confidence_of_extremes_is_a_probability(factor):
    weights = Weights(0.0, factor, factor, factor, factor, factor)
    assert 0 <= learned_confidence(weights, Signals(1.0, 1.0, 1.0, 1.0, 100)) <= 1
    assert 0 <= learned_confidence(weights, NO_SIGNALS) <= 1


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
    assert has_tag(text, tag) == found


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
    decision = decide(PolicyConfig(kind=kind, threshold=0.0), text, SIGNALS)
    assert (decision.defer, decision.reason) == (over, reason)
