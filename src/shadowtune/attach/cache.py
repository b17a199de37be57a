"""One key-value cache for both networks: an ordinary transformers ``Cache`` whose first layers belong to the shadow.

Only the two backbones attend; injection and update work token by token. So one cache of L_s + L layers holds all that
decoding needs, and transformers provides cropping, beam reordering, batch selection, static, offloaded and quantized
caches. Each network gets a view: a ``Cache`` around its own slice of the same layer objects, with the contents that it
would have alone. The shadow's layers come first because both modes, attached and detached, use them: the length of the
cache, read at its first layer, is right in both.

If the attached model does not need the shadow's backbone (variant "stateless"), the shadow's layers hold no keys. They
count tokens instead: one key of one head and width 1 for each, so that operations on the cache (cropping, beams,
batches) apply to the count as well.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from shadowtune.errors import AttachError


def split_cache(cache: Cache, shadow_layers: int, base_layers: int) -> tuple[Cache, Cache]:
    """Return the shadow's and the base's view of ``cache``; writes to a view are writes to the cache.

    A fresh cache made for the base alone, or made without a config, is given the missing layers.

    Raises:
        AttachError: if the cache belongs to a model of another depth, or is of a kind that has no layers to share.
    """
    if not isinstance(cache, Cache):
        raise AttachError(
            f"a {type(cache).__name__} holds one network, but an attached model has two; use a cache of transformers' "
            "class Cache, and generate() in place of continuous batching"
        )
    if len(cache) == 0 and cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(shadow_layers + base_layers))
    elif len(cache) == base_layers and cache.get_seq_length() == 0:
        cache.layers[:0] = [_full_attention_layer(cache) for _ in range(shadow_layers)]
    if len(cache) != shadow_layers + base_layers:
        raise AttachError(
            f"past_key_values has {len(cache)} layers and holds {int(cache.get_seq_length())} tokens, but this model "
            f"needs {shadow_layers} for the shadow and {base_layers} for the base; make one with DynamicCache(config="
            "model.config), and do not mix caches of attached and plain models"
        )
    views = Cache(layers=cache.layers[:shadow_layers]), Cache(layers=cache.layers[shadow_layers:])
    if cache.offloading:  # of the base's layers; the shadow's are too few to prefetch
        views[1].offloading = True
        views[1].only_non_sliding = cache.only_non_sliding
        views[1].prefetch_stream = cache.prefetch_stream
    return views


def cache_of_base(cache: Cache | None, shadow_layers: int, base_layers: int) -> Cache | None:
    """Return the base's view of a cache made for both networks, for the base alone; any other cache as it is.

    Raises:
        AttachError: if the shadow's part holds tokens: the base's keys then come from corrected states, or are missing.
    """
    if not isinstance(cache, Cache) or len(cache) != shadow_layers + base_layers:
        return cache
    shadow_cache, base_cache = split_cache(cache, shadow_layers, base_layers)
    if _is_started(shadow_cache):
        raise AttachError(
            "past_key_values holds tokens of mode 'attached' or 'detached'; start mode 'base' with a new cache"
        )
    return base_cache


def check_same_past(shadow_cache: Cache, base_cache: Cache) -> None:
    """Raise AttachError if the two views hold different tokens, as after decoding in mode "detached"."""
    if _is_started(shadow_cache) == _is_started(base_cache):
        lengths = shadow_cache.get_seq_length(), base_cache.get_seq_length()
        if not all(isinstance(length, int) for length in lengths) or lengths[0] == lengths[1]:
            return  # the length of a static layer is a tensor: to read it would stall the device at each token
    raise AttachError(
        "past_key_values holds tokens that the base has not seen: it was filled in mode 'detached'; "
        "start mode 'attached' with a new cache"
    )


def can_count(cache: Cache) -> bool:
    """Whether the layers of a shadow's view can count tokens: none of them holds keys yet."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer | StaticLayer)]
    plain = len(layers) == len(cache) and all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
    return plain and all(not layer.is_initialized or _counts(layer) for layer in layers)


def count_tokens(cache: Cache, embeds: torch.Tensor) -> None:
    """Count the tokens of a call, given by their embeddings (B, T, d), in the layers of a shadow's view."""
    keys = embeds.new_zeros(embeds.shape[0], 1, embeds.shape[1], 1)
    for index in range(len(cache)):
        cache.update(keys, keys, index)


def check_holds_keys(cache: Cache) -> None:
    """Raise AttachError if a shadow's view only counts tokens whose keys its backbone needs."""
    if any(layer.is_initialized and _counts(layer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)):
        raise AttachError(
            f"past_key_values holds {int(cache.get_seq_length())} tokens that the shadow's backbone has not seen: in "
            "mode 'attached' this shadow runs without it; start mode 'detached' and drafts with a new cache"
        )


def _counts(layer: CacheLayerMixin) -> bool:
    """Whether an initialized layer counts tokens. No attention has one head of width 1: rotation needs pairs."""
    keys = layer.keys
    return isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[1] * keys.shape[3] == 1


def _is_started(cache: Cache) -> bool:
    return bool(next(layer.is_initialized for layer in cache.layers if isinstance(layer, CacheLayerMixin)))


def _full_attention_layer(cache: Cache) -> DynamicLayer | StaticLayer:
    """A layer for the shadow in a cache that was made for the base."""
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    if not static:
        return DynamicLayer()
    lengths = [layer.max_cache_len for layer in static if not layer.is_sliding]
    if not lengths:
        raise AttachError(
            "a static cache made for this base has sliding windows only, which a shadow cannot share; make one with "
            "StaticCache(config=model.config, ...) of a ShadowForCausalLM, or use a dynamic cache"
        )
    return StaticLayer(max_cache_len=lengths[0])
