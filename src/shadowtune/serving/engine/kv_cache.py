"""Key-value cache of sequences with different lengths: a transformers ``Cache`` of preallocated slots, with its masks.

The n cached sequences fill slots 0 to n - 1: when one is removed, the last one moves into its slot. ``inputs`` names
the sequences that a pass runs over and the positions of their new tokens; the layers write there and return the keys
and values of these sequences, up to the longest. Entries behind the end of a sequence are masked, and overwritten as it
grows, so dropping tokens costs nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from shadowtune.compatibility import CACHE
from shadowtune.errors import UnsupportedArchitectureError

INITIAL_SLOTS, INITIAL_TOKENS = 4, 64
"""Initial capacity."""
MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a 4D mask."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of a batch."""


class AttentionMasks:
    """Builds the 4D attention masks of one network.

    Args:
        config: of its decoder.

    Raises:
        UnsupportedArchitectureError: if sequences of a batch would influence one another.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        config = config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        unsupported = {type(layer).__name__ for layer in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        unsupported |= set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if unsupported:
            raise _unsupported(config, f"its {', '.join(sorted(unsupported))} keep no keys by position")
        if ropes := _rope_types(getattr(config, "rope_parameters", None)) & set(LENGTH_DEPENDENT_ROPE):
            raise _unsupported(config, f"its rotary positions ({', '.join(ropes)}) change with the longest row")
        implementation = config._attn_implementation
        if implementation not in MASKED_ATTENTION:
            raise _unsupported(config, f"attention {implementation!r} takes no mask; load it with 'sdpa' or 'eager'")
        self._additive = implementation == "eager"
        windows = {layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers}
        self._has_full = None in windows
        sliding = windows - {None}
        assert len(sliding) <= 1, "transformers' configs have one window"
        self._window = next(iter(sliding), None)

    @property
    def single(self) -> bool:
        """Whether all layers take the same mask."""
        return self._window is None or not self._has_full

    def __call__(self, positions: Tensor, keys: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Return the causal mask (B, 1, T, keys), or one for each layer type if there are two.

        Args:
            positions: (B, T) positions of the queries.
            keys: K, of the longest sequence.
            dtype: of the network, for additive masks.
        """
        distance = positions[:, None, :, None] - torch.arange(keys, device=positions.device)
        full = distance >= 0
        if self._window is None:
            return self._cast(full, dtype)
        sliding = self._cast(full & (distance < self._window), dtype)
        return {"full_attention": self._cast(full, dtype), "sliding_attention": sliding} if self._has_full else sliding

    def _cast(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        if not self._additive:
            return visible
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _rope_types(parameters: object) -> set[str]:
    """Rope types in a config's parameters, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    inner = set().union(*(_rope_types(each) for each in parameters.values()))
    return inner | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())


def _unsupported(config: PreTrainedConfig, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"model_type {config.model_type!r} cannot be served in batches: {reason}")


class CacheIndices(NamedTuple):
    """Slots and positions of the cache that a pass writes to and reads from."""

    slots: Tensor
    """(B, 1)."""
    positions: Tensor
    """Of the new tokens, (B, T)."""
    read: slice | Tensor
    """The same slots; a slice if they are adjacent, which reads without a copy."""
    length: int
    """Keys of the longest sequence, its new ones included."""


class KVCache:
    """Keys and values of the sequences in one network.

    Args:
        config: of the network.
        dtype: of the network.
        device: of the network.

    Raises:
        UnsupportedArchitectureError: if a mask cannot keep sequences of different lengths apart.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.masks = AttentionMasks(config)
        self._layers = [SlotLayer(self) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        self._dtype, self._device = dtype, device
        self._sequences: list[object] = []
        self._slots: dict[object, int] = {}
        self.capacity = (INITIAL_SLOTS, INITIAL_TOKENS)
        """Slots and tokens allocated; grows by doubling, and is reset when the last sequence is removed."""
        self.indices: CacheIndices | None = None
        """Of the current pass."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._sequences)

    def add(self, sequence: object) -> None:
        """Give a sequence a slot."""
        self._slots[sequence] = len(self._sequences)
        self._sequences.append(sequence)

    def remove(self, sequence: object, wipe: bool = False) -> None:
        """Free the slot of a sequence; the last sequence moves into it.

        Args:
            sequence: to be removed.
            wipe: whether its entries may be NaN: a masked value has weight 0, and 0 times NaN is NaN.
        """
        slot, last = self._slots.pop(sequence), self._sequences.pop()
        if slot < len(self._sequences):
            for layer in self._layers:
                layer.move(len(self._sequences), slot)
            self._sequences[slot], self._slots[last] = last, slot
        if wipe:
            for layer in self._layers:
                layer.wipe(len(self._sequences))
        if not self._sequences:
            self.capacity = (INITIAL_SLOTS, INITIAL_TOKENS)
            for layer in self._layers:
                layer.reset()

    def prefix(self, sequence: object, tokens: int, layers: int | None = None) -> list[tuple[Tensor, ...]]:
        """Return views of the first ``tokens`` keys and values of a sequence, (1, heads, tokens, width), by layer.

        Those of the first ``layers`` layers, or of all.
        """
        slot = self._slots[sequence]
        return [layer.read(slot, tokens) for layer in self._layers[:layers]]

    def write_prefix(self, sequence: object, layers: Sequence[tuple[Tensor, ...]], tokens: int) -> None:
        """Copy the first ``tokens`` keys and values of the first layers, as ``prefix`` returns them, to a slot."""
        self.capacity = (_doubled(self.capacity[0], len(self._sequences)), _doubled(self.capacity[1], tokens))
        for layer, (keys, values) in zip(self._layers[: len(layers)], layers, strict=True):
            layer.write(self._slots[sequence], keys[:, :, :tokens], values[:, :, :tokens])

    def inputs(
        self, sequences: Sequence[object], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> dict[str, Any]:
        """Begin a pass; return the mask, position ids and cache as keyword arguments of the network.

        Args:
            sequences: of the pass, B.
            starts: cached tokens of each sequence.
            counts: new tokens of each sequence.
            width: T; sequences with fewer new tokens are right-padded.
        """
        length = max(starts) + width
        slots = [self._slots[sequence] for sequence in sequences]
        self.capacity = (_doubled(self.capacity[0], len(self._sequences)), _doubled(self.capacity[1], length))
        begins = torch.tensor(starts, device=self._device)[:, None]
        positions = begins + torch.arange(width, device=self._device)
        indices = torch.tensor(slots, device=self._device)
        adjacent = slots == list(range(slots[0], slots[0] + len(slots)))
        read: slice | Tensor = slice(slots[0], slots[0] + len(slots)) if adjacent else indices
        self.indices = CacheIndices(indices[:, None], positions, read, length)
        last = begins + torch.tensor(counts, device=self._device)[:, None] - 1
        return {
            "attention_mask": self.masks(positions, length, self._dtype),
            "position_ids": torch.minimum(positions, last),  # padding may exceed the last position of the model
            CACHE: self.cache,
            "use_cache": True,
        }


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, tokens, head width) each."""

    is_sliding = False

    def __init__(self, owner: KVCache) -> None:
        super().__init__()
        self._owner = owner

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, T, width) of a pass; return those of its sequences, up to the longest."""
        indices = self._owner.indices
        assert indices is not None
        self.keys = self._fit(self.keys, key_states)
        self.values = self._fit(self.values, value_states)
        self.is_initialized = True
        self.keys[indices.slots, :, indices.positions] = key_states.transpose(1, 2)
        self.values[indices.slots, :, indices.positions] = value_states.transpose(1, 2)
        return self.keys[indices.read, :, : indices.length], self.values[indices.read, :, : indices.length]

    def read(self, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the first keys and values of a slot, (1, heads, tokens, width) each."""
        assert self.keys is not None and self.values is not None
        return self.keys[slot : slot + 1, :, :tokens], self.values[slot : slot + 1, :, :tokens]

    def write(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Write the first keys and values of a slot, (1, heads, tokens, width) each."""
        self.keys, self.values = self._fit(self.keys, keys), self._fit(self.values, values)
        self.is_initialized = True
        self.keys[slot, :, : keys.shape[2]] = keys[0]
        self.values[slot, :, : values.shape[2]] = values[0]

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for stored in (self.keys, self.values):
            if stored is not None and source < stored.shape[0]:
                stored[target].copy_(stored[source])

    def wipe(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for stored in (self.keys, self.values):
            if stored is not None and slot < stored.shape[0]:
                stored[slot].zero_()

    def reset(self) -> None:
        """Release the memory."""
        self.keys = self.values = None
        self.is_initialized = False

    def _fit(self, stored: Tensor | None, like: Tensor) -> Tensor:
        """Grow storage to the cache's capacity."""
        slots, tokens = self._owner.capacity
        if stored is not None and stored.shape[0] >= slots and stored.shape[2] >= tokens:
            return stored
        larger = like.new_zeros(slots, like.shape[1], tokens, like.shape[3])  # zeros: masked values must be finite
        if stored is not None:
            larger[: stored.shape[0], :, : stored.shape[2]] = stored
        return larger

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence of the pass."""
        return 0 if self._owner.indices is None else self._owner.indices.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys of a pass."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """Return -1: the length is unbounded."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: ``update`` allocates."""


def _doubled(capacity: int, needed: int) -> int:
    while capacity < needed:
        capacity *= 2
    return capacity
