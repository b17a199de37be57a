import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedCache, StaticLayer

from shadowtune.attach.cache import can_count, check_holds_keys, check_same_past, count_tokens, split_cache
from shadowtune.errors import AttachError
from tests.support.bases import tiny_config

FULL, SLIDING = tiny_config(), tiny_config("mistral")
MIXED = tiny_config("gemma2")


def fill(cache, tokens=3, layers=None):
    for index in range(len(cache)) if layers is None else layers:
        cache.update(torch.ones(1, 1, tokens, 2), torch.ones(1, 1, tokens, 2), index)


def test_the_views_are_slices_of_the_same_layers_shadow_first():
    cache = DynamicCache(config=FULL)
    shadow, base = split_cache(cache, 1, 3)
    fill(shadow, 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [2, 0, 0, 0]
    fill(base, 5)
    assert [layer.get_seq_length() for layer in cache.layers] == [2, 5, 5, 5]
    again = split_cache(cache, 1, 3)
    assert [view.layers[0] for view in again] == [shadow.layers[0], base.layers[0]]


@pytest.mark.parametrize(
    ("cache", "kind"),
    [
        (DynamicCache(), DynamicLayer),
        (DynamicCache(config=FULL), DynamicLayer),
        (DynamicCache(config=SLIDING), DynamicLayer),
        (DynamicCache(config=MIXED), DynamicLayer),
        (StaticCache(config=FULL, max_cache_len=40), StaticLayer),
        (StaticCache(config=MIXED, max_cache_len=40), StaticLayer),
    ],
    ids=["lazy", "full", "sliding", "mixed", "static", "static_mixed"],
)
def test_a_fresh_cache_made_for_the_base_gets_layers_that_hold_every_token(cache, kind):
    shadow, base = split_cache(cache, 2, 4)
    assert len(cache) == 6
    assert len(base) == 4
    for layer in shadow.layers:
        assert type(layer) is kind
        assert layer.get_max_length() == (40 if kind is StaticLayer else -1)
    assert shadow.layers[0] is not shadow.layers[1]


def test_layers_of_the_base_keep_their_kind():
    base = split_cache(DynamicCache(config=SLIDING), 1, 4)[1]
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in base.layers)


def test_a_static_cache_without_full_attention_is_refused():
    with pytest.raises(AttachError, match="sliding windows only"):
        split_cache(StaticCache(config=SLIDING, max_cache_len=40), 1, 4)


@pytest.mark.parametrize(("layers", "filled"), [(3, False), (7, False), (4, True), (6, True)])
def test_a_cache_of_another_depth_is_refused_with_the_numbers(layers, filled):
    cache = DynamicCache(config=tiny_config(num_hidden_layers=layers))
    if filled:
        fill(cache)
    held = 3 if filled else 0
    with pytest.raises(AttachError, match=f"has {layers} layers and holds {held} tokens.* 1 for the shadow and 4"):
        split_cache(cache, 1, 4)


def test_of_an_offloaded_cache_the_bases_layers_are_offloaded():
    cache = DynamicCache(config=FULL)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, object()
    shadow, base = split_cache(cache, 1, 4)
    assert not shadow.offloading
    assert (base.offloading, base.only_non_sliding, base.prefetch_stream) == (True, False, cache.prefetch_stream)


def test_views_of_different_pasts_are_told_apart():
    cache = DynamicCache(config=FULL)
    views = split_cache(cache, 1, 3)
    check_same_past(*views)
    fill(views[0])
    with pytest.raises(AttachError, match="filled in mode 'detached'"):
        check_same_past(*views)
    fill(views[1])
    check_same_past(*views)
    fill(views[0], 1)
    with pytest.raises(AttachError):
        check_same_past(*views)


def test_static_views_of_different_pasts_are_told_apart_while_the_base_is_empty():
    views = split_cache(StaticCache(config=FULL, max_cache_len=40), 1, 3)
    check_same_past(*views)
    fill(views[0])
    with pytest.raises(AttachError):
        check_same_past(*views)
    fill(views[1])
    check_same_past(*views)


@pytest.mark.parametrize("cache", [DynamicCache(config=FULL), StaticCache(config=FULL, max_cache_len=40)], ids=str)
def test_layers_without_keys_count_tokens_and_do_not_pass_for_filled(cache):
    shadow, base = split_cache(cache, 1, 3)
    assert can_count(shadow)
    check_holds_keys(shadow)
    for new, length in ((4, 4), (1, 5)):
        count_tokens(shadow, torch.zeros(2, new, 32))
        fill(base, new)
        assert int(cache.get_seq_length()) == length
    check_same_past(shadow, base)
    assert can_count(shadow)
    with pytest.raises(AttachError, match="holds 5 tokens that the shadow's backbone has not seen"):
        check_holds_keys(shadow)


def test_counts_follow_what_is_done_with_a_cache():
    cache = DynamicCache(config=FULL)
    shadow, base = split_cache(cache, 1, 3)
    count_tokens(shadow, torch.zeros(2, 6, 32))
    for index in range(len(base)):
        base.update(torch.ones(2, 1, 6, 2), torch.ones(2, 1, 6, 2), index)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([1, 0, 2]))
    assert {layer.keys.shape[0] for layer in cache.layers} == {3}
    assert {layer.get_seq_length() for layer in cache.layers} == {4}
    assert can_count(shadow)


def test_layers_that_hold_keys_or_change_them_do_not_count():
    cache = DynamicCache(config=FULL)
    shadow, _ = split_cache(cache, 1, 3)
    fill(shadow)
    assert not can_count(shadow)
    check_holds_keys(shadow)
    quantized = QuantizedCache("fp8", config=FULL)
    assert not can_count(quantized)
