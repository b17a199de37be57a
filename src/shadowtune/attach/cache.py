"""One key-value cache for both networks: an ordinary transformers ``Cache`` whose first layers belong to the shadow.

Only the two backbones attend; injection and update work token by token. So one cache of L_s + L layers holds all that
decoding needs, and cropping, beam reordering, batch selection, static, offloaded and quantized caches come from
transformers. Each network is handed a view: a ``Cache`` around its own slice of the same layer objects, in which it
finds exactly what it would find alone. The shadow's layers stand first because they are used in both modes, attached
and detached: the length of the cache, read at its first layer, is right in both.

A shadow whose backbone the attached model does not read (variant "stateless") leaves its layers without keys. They then
count tokens: a key of one head and width 1 stands for each, so that whatever is done with the cache (cropping, beams,
batches) is done with the count as well.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from shadowtune.errors import AttachError


def split_cache(cache: Cache, shadow_layers: int, base_layers: int) -> tuple[Cache, Cache]:
    """Return the shadow's and the base's view of ``cache``; what one writes, the cache holds.

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
    if cache.offloading:  # of the base's layers; the shadow's are too few to fetch one while another works
        views[1].offloading = True
        views[1].only_non_sliding = cache.only_non_sliding
        views[1].prefetch_stream = cache.prefetch_stream
    return views


def check_same_past(shadow_cache: Cache, base_cache: Cache) -> None:
    """Raise AttachError if the two views hold different pasts, as after decoding in mode "detached"."""
    if _is_started(shadow_cache) == _is_started(base_cache):
        lengths = shadow_cache.get_seq_length(), base_cache.get_seq_length()
        if not all(isinstance(length, int) for length in lengths) or lengths[0] == lengths[1]:
            return  # the length of a static layer is a tensor: to read it would stall the device at each token
    raise AttachError(
        "past_key_values holds tokens that the base has not seen: it was filled in mode 'detached'; "
        "start mode 'attached' with a new cache"
    )


def can_count(cache: Cache) -> bool:
    """Whether the layers of a shadow's view can count tokens in place of holding keys: none of them holds any yet."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer | StaticLayer)]
    plain = len(layers) == len(cache) and all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
    return plain and all(not layer.is_initialized or _counts(layer) for layer in layers)


def count_tokens(cache: Cache, embeds: torch.Tensor) -> None:
    """Let the layers of a shadow's view count the tokens of a call, given as their embeddings (B, T, d)."""
    keys = embeds.new_zeros(embeds.shape[0], 1, embeds.shape[1], 1)
    for index in range(len(cache)):
        cache.update(keys, keys, index)


def check_holds_keys(cache: Cache) -> None:
    """Raise AttachError if a shadow's view counts tokens whose keys its backbone would need."""
    if any(layer.is_initialized and _counts(layer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)):
        raise AttachError(
            f"past_key_values holds {int(cache.get_seq_length())} tokens that the shadow's backbone has not seen: in "
            "mode 'attached' this shadow runs without it; start mode 'detached' and drafts with a new cache"
        )


def _counts(layer: CacheLayerMixin) -> bool:
    """Whether an initialized layer counts tokens. No attention has a single head of width 1: rotation takes pairs."""
    keys = layer.keys
    return isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[1] * keys.shape[3] == 1


def _is_started(cache: Cache) -> bool:
    return next(layer.is_initialized for layer in cache.layers if isinstance(layer, CacheLayerMixin))


def _full_attention_layer(cache: Cache) -> DynamicLayer | StaticLayer:
    """A layer for the shadow beside those that were made for the base."""
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
