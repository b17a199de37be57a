import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.serving.edge.signals import NOTHING, Chosen, read_likely, read_logits, signals_of
from tests.support.properties import property_test

HALF = math.log(0.5)


def test_signals_of_hand_made_tokens():
    tokens = [Chosen(1, math.log(0.9), 0.8, 0.1), Chosen(2, math.log(0.4), 0.2, 0.5)]
    signals = signals_of(tokens)
    assert signals.logprob == pytest.approx(math.sqrt(0.9 * 0.4))
    assert (signals.margin, signals.entropy, signals.length) == (0.2, pytest.approx(0.7), 2)
    assert signals.first == pytest.approx(0.9)


def test_an_answer_without_tokens_is_not_sure_of_anything():
    assert signals_of([]) == NOTHING


def test_a_token_is_told_of_by_its_logits():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3
    token = read_logits(logits, 1, 2)
    assert token.logprob == pytest.approx(math.log(0.25))
    assert token.margin == pytest.approx(0.25)
    assert token.entropy == pytest.approx(1.75 / 2)
    assert [index for index, _ in token.top] == [0, 1]
    assert read_logits(logits, 1, 0).top == ()


def test_a_certain_token_has_no_entropy_and_infinite_logits_are_numbers():
    token = read_logits(torch.tensor([0.0, -math.inf, -math.inf]), 0, 0)
    assert (token.logprob, token.margin, token.entropy) == (0.0, 1.0, 0.0)


@property_test
@given(st.lists(st.floats(-8, 8), min_size=3, max_size=12), st.integers(2, 12))
def test_the_likeliest_alone_tell_the_same_but_for_an_entropy_that_may_be_too_large(logits, known):
    tensor = torch.tensor(logits)
    whole = read_logits(tensor, 0, len(logits))
    part = read_likely(0, whole.logprob, whole.top[:known], len(logits), 1)
    assert part.margin == pytest.approx(whole.margin)
    assert part.entropy >= whole.entropy - 1e-5
    if known >= len(logits):
        assert part.entropy == pytest.approx(whole.entropy, abs=1e-5)
    assert part.top == whole.top[:1]


def test_one_likely_token_has_a_margin_over_nothing():
    assert read_likely(0, HALF, [(0, HALF)], 2, 0).margin == pytest.approx(0.5)
