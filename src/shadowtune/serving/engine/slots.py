"""Keys and values of rows that come, grow by different lengths and go: a transformers ``Cache`` of preallocated slots.

Rows that are there stay together in slots 0 to n - 1: where one leaves, the last one moves into its place. A pass says
which rows it is over and where in each of them its tokens begin; the layers write them there, and hand out the keys of
these rows up to the longest. What a row holds behind its end is never seen, and written over as it grows: a row takes
tokens back by not counting them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from shadowtune.compatibility import CACHE
from shadowtune.serving.engine.masks import Masks

FIRST_ROWS, FIRST_TOKENS = 4, 64
"""Room to begin with."""


class Places(NamedTuple):
    """Where a pass writes and reads."""

    rows: Tensor
    """Slots (B, 1)."""
    positions: Tensor
    """Of the new tokens, (B, T)."""
    read: slice | Tensor
    """The same slots, as a part of the cache where they lie side by side."""
    longest: int
    """Keys of the longest row, its new ones included."""


class Slots:
    """Rows in the cache of one network.

    Args:
        config: of the network.
        dtype: of the network.
        device: of the network.

    Raises:
        UnsupportedArchitectureError: if rows of different lengths cannot be told apart by a mask.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.masks = Masks(config)
        self._layers = [SlotLayer(self) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        self._dtype, self._device = dtype, device
        self._rows: list[object] = []
        self._slots: dict[object, int] = {}
        self.capacity = (FIRST_ROWS, FIRST_TOKENS)
        """Rows and tokens that there is room for; grows by doubling, and back to the first when the last row leaves."""
        self.places: Places | None = None
        """Of the pass that is running."""

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self._rows)

    def join(self, row: object) -> None:
        """Give a row a slot."""
        self._slots[row] = len(self._rows)
        self._rows.append(row)

    def leave(self, row: object, wipe: bool = False) -> None:
        """Free a row's slot; the last row moves into it.

        Args:
            row: that has ended.
            wipe: whether it may hold NaN: a masked value counts 0 times, and 0 times NaN is NaN for the next row.
        """
        hole, last = self._slots.pop(row), self._rows.pop()
        if hole < len(self._rows):
            for layer in self._layers:
                layer.move(len(self._rows), hole)
            self._rows[hole], self._slots[last] = last, hole
        if wipe:
            for layer in self._layers:
                layer.wipe(len(self._rows))
        if not self._rows:
            self.capacity = (FIRST_ROWS, FIRST_TOKENS)
            for layer in self._layers:
                layer.reset()

    def inputs(
        self, rows: Sequence[object], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> dict[str, Any]:
        """Begin a pass; return the keywords for the network that say where its tokens are.

        Args:
            rows: of the pass, B.
            starts: tokens that each row has already.
            counts: new tokens of each row.
            width: T, of the pass; rows with fewer are padded behind.
        """
        longest = max(starts) + width
        slots = [self._slots[row] for row in rows]
        self.capacity = (_doubled(self.capacity[0], len(self._rows)), _doubled(self.capacity[1], longest))
        begins = torch.tensor(starts, device=self._device)[:, None]
        positions = begins + torch.arange(width, device=self._device)
        indices = torch.tensor(slots, device=self._device)
        side_by_side = slots == list(range(slots[0], slots[0] + len(slots)))
        read: slice | Tensor = slice(slots[0], slots[0] + len(slots)) if side_by_side else indices
        self.places = Places(indices[:, None], positions, read, longest)
        ends = begins + torch.tensor(counts, device=self._device)[:, None] - 1
        return {
            "attention_mask": self.masks(positions, longest, self._dtype),
            "position_ids": torch.minimum(positions, ends),  # padding may lie beyond the last position there is
            CACHE: self.cache,
            "use_cache": True,
        }


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, tokens, head width) each."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._owner = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, T, width) of a pass; return those of its rows, up to the longest."""
        places = self._owner.places
        assert places is not None
        self.keys = self._fit(self.keys, key_states)
        self.values = self._fit(self.values, value_states)
        self.is_initialized = True
        self.keys[places.rows, :, places.positions] = key_states.transpose(1, 2)
        self.values[places.rows, :, places.positions] = value_states.transpose(1, 2)
        return self.keys[places.read, :, : places.longest], self.values[places.read, :, : places.longest]

    def move(self, source: int, target: int) -> None:
        """Copy a row into another slot."""
        for stored in (self.keys, self.values):
            if stored is not None and source < stored.shape[0]:
                stored[target].copy_(stored[source])

    def wipe(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for stored in (self.keys, self.values):
            if stored is not None and slot < stored.shape[0]:
                stored[slot].zero_()

    def reset(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.is_initialized = False

    def _fit(self, stored: Tensor | None, like: Tensor) -> Tensor:
        """Bring storage to the capacity."""
        rows, tokens = self._owner.capacity
        if stored is not None and stored.shape[0] >= rows and stored.shape[2] >= tokens:
            return stored
        larger = like.new_zeros(rows, like.shape[1], tokens, like.shape[3])  # zeros: masked garbage must be finite
        if stored is not None:
            larger[: stored.shape[0], :, : stored.shape[2]] = stored
        return larger

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return 0 if self._owner.places is None else self._owner.places.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass sees, from the first on."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """There is no largest length."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: ``update`` makes room."""


def _doubled(room: int, needed: int) -> int:
    while room < needed:
        room *= 2
    return room
