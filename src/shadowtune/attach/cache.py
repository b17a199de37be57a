"""One key-value cache for both networks: an ordinary transformers ``Cache`` whose first layers belong to the shadow.

Only the two backbones attend; injection and update work token by token. So one cache of L_s + L layers holds all that
decoding needs, and cropping, beam reordering, batch selection, static, offloaded and quantized caches come from
transformers. Each network is handed a view: a ``Cache`` around its own slice of the same layer objects, in which it
finds exactly what it would find alone. The shadow's layers stand first because they are used in both modes, attached
and detached: the length of the cache, read at its first layer, is right in both.
"""

from typing import cast

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from shadowtune.errors import AttachError


def split_cache(cache: Cache, shadow_layers: int, base_layers: int) -> tuple[Cache, Cache]:
    """Return the shadow's and the base's view of ``cache``; what one writes, the cache holds.

    A fresh cache made for the base alone, or made without a config, is given the missing layers.

    Raises:
        AttachError: if the cache belongs to a model of another depth.
    """
    if len(cache) == 0 and cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(shadow_layers + base_layers))
    elif len(cache) == base_layers and cache.get_seq_length() == 0:
        cache.layers[:0] = [_full_attention_layer(cache) for _ in range(shadow_layers)]
    if len(cache) != shadow_layers + base_layers:
        raise AttachError(
            f"past_key_values has {len(cache)} layers and holds {cache.get_seq_length()} tokens, but this model needs "
            f"{shadow_layers} for the shadow and {base_layers} for the base; make one with DynamicCache(config="
            "model.config), and do not mix caches of attached and plain models"
        )
    return _view(cache, 0, shadow_layers), _view(cache, shadow_layers, shadow_layers + base_layers)


def _full_attention_layer(cache: Cache) -> DynamicLayer | StaticLayer:
    length = cache.get_max_length()
    return DynamicLayer() if length < 0 else StaticLayer(max_cache_len=length)


def _view(cache: Cache, start: int, stop: int) -> Cache:
    view = Cache(layers=cast(list, cache.layers[start:stop]))
    if cache.offloading:
        view.offloading = True
        view.only_non_sliding = cache.only_non_sliding
        view.prefetch_stream = cache.prefetch_stream
    return view
