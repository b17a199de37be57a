import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from shadowtune.attach.cache import check_same_past, split_cache
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
