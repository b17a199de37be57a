"""One pass of the base over rows of different shadows, each row beside its own."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.core.boundary import ShadowState
from shadowtune.core.multi_adapter import AdapterStack, batching_key
from shadowtune.serving.engine.adapters import Adapter, padded
from shadowtune.serving.engine.rows import Row
from shadowtune.serving.engine.slots import Slots

MIXTURES = 8
"""Sets of shadows whose stacks are kept."""
Known = Sequence[tuple[Sequence[Row], Tensor]]
"""Rows of one shadow, and their s0 (rows, T, d) where its backbone has run already."""


class Networks:
    """The base, and what joins it with the shadows.

    Args:
        base: a frozen causal language model.

    Raises:
        UnsupportedArchitectureError: if it has no row in the table, or cannot be served in batches.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        architecture = architecture_of(base.config)
        self.base = base.eval()
        self.slots = Slots(base.config, base.dtype, base.device)
        self._decoder: Any = architecture.decoder_of(base)
        self._logits_transform = architecture.logits_transform(base.config.get_text_config(decoder=True))
        self._mixtures: OrderedDict[tuple[Adapter, ...], AdapterStack] = OrderedDict()

    def join(self, row: Row) -> None:
        """Give a row its slots."""
        self.slots.join(row)
        if row.adapter is not None:
            row.adapter.slots.join(row)

    def leave(self, row: Row, wipe: bool = False) -> None:
        """Free a row's slots; ``wipe`` if they may hold NaN."""
        self.slots.leave(row, wipe)
        if row.adapter is not None:
            row.adapter.slots.leave(row, wipe)

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Part rows into those that can share a pass; rows of the bare base join the first.

        An adapter with weights that are not finite has a pass of its own: in a mixture its columns are multiplied by 0
        for the others' rows, and 0 times NaN is NaN.
        """
        groups: dict[Hashable, list[Row]] = {}
        keys = [None if row.adapter is None else _key(row.adapter) for row in rows]
        first = next((key for key, row in zip(keys, rows, strict=True) if row.adapter and row.adapter.finite), None)
        for row, key in zip(rows, keys, strict=True):
            groups.setdefault(first if key is None else key, []).append(row)
        return list(groups.values())

    def run(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], known: Known = ()) -> Tensor:
        """Run base and shadows over the next tokens of rows of one group.

        Args:
            rows: B.
            tokens: of each, of which T is the most.
            known: s0 of some rows, at as many tokens as they have here; the backbones run over the others.

        Returns:
            The last hidden states (B, T, d); what stands behind a row's own tokens means nothing.
        """
        ids = padded(tokens, self.base.device)
        state = self._state(rows, tokens, known, ids.shape[1])
        starts, counts = [row.cached for row in rows], [len(line) for line in tokens]
        shadow = {} if state is None else {"shadow": state}
        output = self._decoder(input_ids=ids, **self.slots.inputs(rows, starts, counts, ids.shape[1]), **shadow)
        hidden_states: Tensor = output.last_hidden_state
        return hidden_states

    def head(self, states: Tensor) -> Tensor:
        """Apply the base's head: (..., d) -> (..., V)."""
        logits = self.base.get_output_embeddings()(states.to(self.base.dtype))
        return logits if self._logits_transform is None else self._logits_transform(logits)

    def forget(self, adapter: Adapter) -> None:
        """Let go of what was made of a shadow."""
        for members in [members for members in self._mixtures if adapter in members]:
            del self._mixtures[members]

    def _state(
        self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], known: Known, width: int
    ) -> ShadowState | None:
        """Gather s0 of all shadows into the order of the rows, with the boundaries that refine it.

        Backbones that neither the attached model nor a drafter needs do not run; beside others, their rows get zeros.
        """
        members = tuple(sorted({row.adapter for row in rows if row.adapter is not None}, key=lambda each: each.name))
        if not members:
            return None
        parts, done = list(known), {row for some, _ in known for row in some}
        for member in members:
            places = [place for place, row in enumerate(rows) if row.adapter is member and row not in done]
            if places and member.runs_backbone:
                some = [rows[place] for place in places]
                parts.append((some, member.initial_states(some, [tokens[place] for place in places])))
        alone = len(members) == 1 and all(row.adapter is not None for row in rows)
        if alone and len(parts) == 1 and parts[0][1].shape[1] == width:
            return ShadowState(members[0].boundaries, parts[0][1])
        states = _gathered(rows, parts, width) if parts else None
        if alone:
            return ShadowState(members[0].boundaries, states)
        owners = [None if row.adapter is None else members.index(row.adapter) for row in rows]
        return ShadowState(self._mixture(members).for_sequences(owners, width), states)

    def _mixture(self, members: tuple[Adapter, ...]) -> AdapterStack:
        if members not in self._mixtures:
            self._mixtures[members] = AdapterStack([member.boundaries for member in members])
        self._mixtures.move_to_end(members)
        while len(self._mixtures) > MIXTURES:
            self._mixtures.popitem(last=False)
        return self._mixtures[members]


def _gathered(rows: Sequence[Row], parts: Known, width: int) -> Tensor:
    """Put the s0 of some rows each into one tensor (B, T, d) in the order of all rows, zeros for the others."""
    like, place_of = parts[0][1], {row: place for place, row in enumerate(rows)}
    states = like.new_zeros(len(rows), width, like.shape[2])
    for own, part in parts:
        places = [place_of[row] for row in own]
        states[torch.tensor(places, device=states.device), : part.shape[1]] = part.to(states.dtype)
    return states


def _key(adapter: Adapter) -> Hashable:
    """What adapters that share a pass have in common."""
    return batching_key(adapter.boundaries) if adapter.finite else adapter.name
