"""The cache of a changing batch equals a cache of each sequence alone; attention masks."""

import pytest
import torch

from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.serving.engine.kv_cache import INITIAL_SLOTS, INITIAL_TOKENS, AttentionMasks, KVCache
from tests.support.bases import tiny_base, tiny_config
from tests.support.shadows import tokens


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def cache_of(base):
    return KVCache(base.config, base.dtype, base.device)


@torch.no_grad()
def feed(base, cache, texts, lengths, new):
    """Run the next ``new[name]`` tokens of each row; return the last hidden state of each."""
    names = list(new)
    parts = [texts[name][lengths[name] : lengths[name] + new[name]] for name in names]
    width = max(new.values())
    ids = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts])
    inputs = cache.inputs(names, [lengths[name] for name in names], list(new.values()), width)
    hidden = base.model(input_ids=ids, **inputs).last_hidden_state
    for name in names:
        lengths[name] += new[name]
    return {name: hidden[place, new[name] - 1] for place, name in enumerate(names)}


@torch.no_grad()
def check(base, texts, lengths, states):
    for name, state in states.items():
        true = base.model(torch.tensor([texts[name][: lengths[name]]])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, true, rtol=1e-4, atol=1e-5)


def test_sequences_of_different_lengths_are_added_and_removed(base):
    cache, names = cache_of(base), "abcdef"
    texts = {name: tokens(1, 100, seed=place)[0].tolist() for place, name in enumerate(names)}
    lengths = dict.fromkeys(names, 0)
    for name in names:
        cache.add(name)
    check(base, texts, lengths, feed(base, cache, texts, lengths, {name: 3 + 2 * i for i, name in enumerate(names)}))
    check(base, texts, lengths, feed(base, cache, texts, lengths, dict.fromkeys(names, 1)))
    for gone in "bf":  # a hole that the last row moves into, and then the last row
        cache.remove(gone)
    assert len(cache) == 4
    check(base, texts, lengths, feed(base, cache, texts, lengths, {"e": 2, "a": 1, "d": 4}))  # out of order, some
    lengths["d"] -= 3  # tokens taken back
    check(base, texts, lengths, feed(base, cache, texts, lengths, dict.fromkeys("acde", 1)))
    cache.add("b")  # anew, in a used slot
    lengths["b"] = 0
    check(base, texts, lengths, feed(base, cache, texts, lengths, {"b": 70, "c": 1}))  # more than there was room for


def test_capacity_doubles_and_is_released(base):
    cache = cache_of(base)
    texts = {row: tokens(1, 90, seed=row)[0].tolist() for row in range(5)}
    lengths = dict.fromkeys(texts, 0)
    for row in texts:
        cache.add(row)
    feed(base, cache, texts, lengths, dict.fromkeys(texts, 2))
    assert cache.capacity == (2 * INITIAL_SLOTS, INITIAL_TOKENS)
    feed(base, cache, texts, lengths, {3: 80})
    assert cache.capacity == (2 * INITIAL_SLOTS, 2 * INITIAL_TOKENS)
    assert cache.cache.layers[0].keys.shape == (8, 2, 128, 8)
    for row in texts:
        cache.remove(row)
    assert cache.capacity == (INITIAL_SLOTS, INITIAL_TOKENS)
    assert cache.cache.layers[0].keys is None


def test_adjacent_slots_are_read_without_a_copy(base):
    cache = cache_of(base)
    for row in "abc":
        cache.add(row)
    cache.inputs("bc", [0, 0], [1, 1], 1)
    assert isinstance(cache.indices.read, slice)
    cache.inputs("ac", [0, 0], [1, 1], 1)
    assert not isinstance(cache.indices.read, slice)


def test_padding_never_exceeds_the_last_position_of_its_sequence():
    base = tiny_base("opt")  # 128 learned positions
    cache = cache_of(base)
    cache.add("a")
    cache.add("b")
    inputs = cache.inputs("ab", [126, 0], [2, 9], 9)
    assert inputs["position_ids"].tolist() == [[126] + [127] * 8, list(range(9))]


POSITIONS = torch.tensor([[3, 4], [0, 1]])


def masks(model_type="llama", **settings):
    return AttentionMasks(tiny_base(model_type, **settings).config)


def visible(mask):
    return [[row.nonzero()[:, 0].tolist() for row in rows] for rows in mask[:, 0]]


def test_a_token_attends_to_earlier_tokens_of_its_own_sequence():
    mask = masks()(POSITIONS, 6, torch.float32)
    assert mask.shape == (2, 1, 2, 6)
    assert visible(mask) == [[[0, 1, 2, 3], [0, 1, 2, 3, 4]], [[0], [0, 1]]]


def test_a_sliding_window_bounds_what_a_token_attends_to():
    assert visible(masks("mistral", sliding_window=2)(POSITIONS, 6, torch.float32)) == [[[2, 3], [3, 4]], [[0], [0, 1]]]


def test_layers_with_and_without_a_window_get_masks_of_their_own():
    both = masks("gemma3_text", sliding_window=2)(POSITIONS, 6, torch.float32)
    assert visible(both["full_attention"])[0] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert visible(both["sliding_attention"])[0] == [[2, 3], [3, 4]]


def test_eager_attention_adds_the_mask():
    mask = masks("gemma2")(POSITIONS, 6, torch.bfloat16)["full_attention"]
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("qwen3_next", {}, "'qwen3_next' cannot be served in batches: its .* keep no keys by position"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rotary positions \(dynamic\) change with the longest row",
        ),
        ("llama", {"attn_implementation": "flash_attention_2"}, "attention 'flash_attention_2' takes no mask"),
    ],
)
def test_architectures_whose_sequences_are_not_independent_are_refused(model_type, settings, said):
    implementation = settings.pop("attn_implementation", "sdpa") if "attn_implementation" in settings else "sdpa"
    config = tiny_config(model_type, **settings)
    config._attn_implementation_internal = implementation
    with pytest.raises(UnsupportedArchitectureError, match=said):
        AttentionMasks(config)
