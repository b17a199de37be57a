"""What each token of rows of different lengths may attend to, as transformers takes it: ready-made 4D masks."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shadowtune.errors import UnsupportedArchitectureError

BY_MASK = ("sdpa", "eager")
"""Implementations of attention that take a mask for each token."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary positions that depend on the longest row of a batch."""


class Masks:
    """Makes the masks of one network.

    Args:
        config: of its decoder.

    Raises:
        UnsupportedArchitectureError: if its rows would not be independent of one another.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        config = config.get_text_config(decoder=True)
        implementation, settings = config._attn_implementation, vars(config)
        layers = DynamicCache(config=config).layers
        kinds = settings.get("layer_types") or []
        strange = {type(layer).__name__ for layer in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        strange |= set(kinds) - {"full_attention", "sliding_attention"}
        if strange:
            raise _unservable(config, f"its {', '.join(sorted(strange))} keep no keys by position")
        if ropes := _rope_types(settings.get("rope_parameters")) & set(BY_LENGTH):
            raise _unservable(config, f"its rotary positions ({', '.join(ropes)}) change with the longest row")
        if implementation not in BY_MASK:
            raise _unservable(config, f"attention {implementation!r} takes no mask; load it with 'sdpa' or 'eager'")
        self._additive = implementation == "eager"
        windows = {layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers}
        self._full = None in windows
        sliding = windows - {None}
        assert len(sliding) <= 1, "transformers' configs have one window"
        self._window = next(iter(sliding), None)

    def __call__(self, positions: Tensor, keys: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Return the mask (B, 1, T, keys), or one for each kind of layer where there are two.

        Args:
            positions: (B, T) of the queries; each sees the keys up to its own.
            keys: K, of the longest row.
            dtype: of the network, for masks that are added.
        """
        distance = positions[:, None, :, None] - torch.arange(keys, device=positions.device)
        full = distance >= 0
        if self._window is None:
            return self._as_taken(full, dtype)
        sliding = self._as_taken(full & (distance < self._window), dtype)
        return {"full_attention": self._as_taken(full, dtype), "sliding_attention": sliding} if self._full else sliding

    def _as_taken(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._additive:
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )


def _rope_types(parameters: object) -> set[str]:
    """Kinds of rotary positions in a config's settings, which may stand by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    inner = set().union(*(_rope_types(each) for each in parameters.values()))
    return inner | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())


def _unservable(config: PreTrainedConfig, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"model_type {config.model_type!r} cannot be served in batches: {reason}")
