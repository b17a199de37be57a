"""The cache of rows that come and go, against a cache of each row alone."""

import pytest
import torch

from shadowtune.serving.engine.slots import FIRST_ROWS, FIRST_TOKENS, Slots
from tests.support.bases import tiny_base
from tests.support.shadows import tokens


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def slots_of(base):
    return Slots(base.config, base.dtype, base.device)


@torch.no_grad()
def feed(base, slots, texts, lengths, new):
    """Run the next ``new[name]`` tokens of each row; return the last hidden state of each."""
    names = list(new)
    parts = [texts[name][lengths[name] : lengths[name] + new[name]] for name in names]
    width = max(new.values())
    ids = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts])
    inputs = slots.inputs(names, [lengths[name] for name in names], list(new.values()), width)
    hidden = base.model(input_ids=ids, **inputs).last_hidden_state
    for name in names:
        lengths[name] += new[name]
    return {name: hidden[place, new[name] - 1] for place, name in enumerate(names)}


@torch.no_grad()
def check(base, texts, lengths, states):
    for name, state in states.items():
        true = base.model(torch.tensor([texts[name][: lengths[name]]])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, true, rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths_come_and_go(base):
    slots, names = slots_of(base), "abcdef"
    texts = {name: tokens(1, 100, seed=place)[0].tolist() for place, name in enumerate(names)}
    lengths = dict.fromkeys(names, 0)
    for name in names:
        slots.join(name)
    check(base, texts, lengths, feed(base, slots, texts, lengths, {name: 3 + 2 * i for i, name in enumerate(names)}))
    check(base, texts, lengths, feed(base, slots, texts, lengths, dict.fromkeys(names, 1)))
    for gone in "bf":  # a hole that the last row moves into, and then the last row
        slots.leave(gone)
    assert len(slots) == 4
    check(base, texts, lengths, feed(base, slots, texts, lengths, {"e": 2, "a": 1, "d": 4}))  # out of order, some
    lengths["d"] -= 3  # tokens taken back
    check(base, texts, lengths, feed(base, slots, texts, lengths, dict.fromkeys("acde", 1)))
    slots.join("b")  # anew, in a used slot
    lengths["b"] = 0
    check(base, texts, lengths, feed(base, slots, texts, lengths, {"b": 70, "c": 1}))  # more than there was room for


def test_room_grows_by_doubling_and_is_given_back(base):
    slots = slots_of(base)
    texts = {row: tokens(1, 90, seed=row)[0].tolist() for row in range(5)}
    lengths = dict.fromkeys(texts, 0)
    for row in texts:
        slots.join(row)
    feed(base, slots, texts, lengths, dict.fromkeys(texts, 2))
    assert slots.capacity == (2 * FIRST_ROWS, FIRST_TOKENS)
    feed(base, slots, texts, lengths, {3: 80})
    assert slots.capacity == (2 * FIRST_ROWS, 2 * FIRST_TOKENS)
    assert slots.cache.layers[0].keys.shape == (8, 2, 128, 8)
    for row in texts:
        slots.leave(row)
    assert slots.capacity == (FIRST_ROWS, FIRST_TOKENS)
    assert slots.cache.layers[0].keys is None


def test_rows_side_by_side_are_read_without_a_copy(base):
    slots = slots_of(base)
    for row in "abc":
        slots.join(row)
    slots.inputs("bc", [0, 0], [1, 1], 1)
    assert isinstance(slots.places.read, slice)
    slots.inputs("ac", [0, 0], [1, 1], 1)
    assert not isinstance(slots.places.read, slice)


def test_padding_has_no_position_behind_the_rows_own():
    base = tiny_base("opt")  # 128 learned positions
    slots = slots_of(base)
    slots.join("a")
    slots.join("b")
    inputs = slots.inputs("ab", [126, 0], [2, 9], 9)
    assert inputs["position_ids"].tolist() == [[126] + [127] * 8, list(range(9))]
