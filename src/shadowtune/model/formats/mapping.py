"""Which of our tensors is which of a peer's. One entry names one tensor of the peer; weights and gradients go alike.

Both peers store one module per block and weights as (outputs, inputs); we stack over boundaries and store
(inputs, outputs). Our boundary j > 0 updates the state with the output of a block and keeps its parameters in slot
j - 1, so slot j of ours is slot j of shadow-peft and block j of PEFT. Both peers own one more update, after the last
block: nobody reads what it computes. In a file written for a peer it is zero.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shadowtune.errors import CheckpointError


class Entry(NamedTuple):
    """One tensor of the peer, and where it lies in ours."""

    peer: str
    """Key in the peer's model."""
    ours: str
    """Key in our ``Shadow``."""
    slot: int | None = None
    """Row of our stack; None where the whole tensor is meant."""
    transposed: bool = False


class Place(NamedTuple):
    """Where a peer's backbone keeps what ours does."""

    nested: str = ""
    """Path from the peer's backbone to ours, with a dot at its end if not empty."""
    embedding: str = "embed_tokens"
    """Path from our backbone to its input embedding."""

    @property
    def embedding_key(self) -> str:
        """Key of the embedding in the peer's backbone."""
        return f"{self.nested}{self.embedding}.weight"


def folded_state(shadow: nn.Module) -> dict[str, Tensor]:
    """Return a shadow's tensors by name, its channel scales folded into W_down, which is all that others know."""
    state = dict(shadow.state_dict())
    scales = state.pop("boundaries.channel_scales", None)
    if scales is not None:
        state["boundaries.injection_downs"] = state["boundaries.injection_downs"] * scales[:, :, None]
    return state


def shadow_peft_entries(boundaries: int, ours: Iterable[str], place: Place = Place()) -> list[Entry]:  # noqa: B008
    """Entries for shadow-peft 0.1.1, keys as in its ``ShadowPeftModel``; ``ours`` are the keys of our shadow."""
    injection, update = "shadow_injection_model", "shadow_update_model"
    entries = [
        Entry(f"{injection}.injection_downs", "boundaries.injection_downs"),
        Entry(f"{injection}.injection_ups", "boundaries.injection_ups"),
    ]
    if boundaries > 1:
        entries += [Entry(theirs, f"boundaries.{name}") for name, theirs in SHADOW_PEFT_NORM.items()]
    for slot in range(boundaries - 1):
        for name, theirs in SHADOW_PEFT_UPDATE.items():
            entries.append(Entry(f"{update}.{theirs.format(slot)}", f"boundaries.{name}", slot, transposed=True))
    return entries + _renamed(ours, "shadow_model.", "shadow_hidden_projection.", place)


def shadow_peft_dead(boundaries: int) -> set[str]:
    """Keys of the update after the last block, which no gradient reaches; beside one boundary, of the norm too."""
    dead = {f"shadow_update_model.{theirs.format(boundaries - 1)}" for theirs in SHADOW_PEFT_UPDATE.values()}
    return dead if boundaries > 1 else dead | set(SHADOW_PEFT_NORM.values())


SHADOW_PEFT_UPDATE = {
    "transform_downs": "update_transforms.{}.0.weight",
    "transform_ups": "update_transforms.{}.3.weight",
    "gate_downs": "update_gates.{}.0.weight",
    "gate_ups": "update_gates.{}.2.weight",
}
"""Our stacks of the update, and what shadow-peft calls each slot."""
SHADOW_PEFT_NORM = {
    "norm_weight": "shadow_update_model.hidden_norm.weight",
    "norm_bias": "shadow_update_model.hidden_norm.bias",
}
"""Our norm before the update, and what shadow-peft calls it."""


def peft_entries(
    blocks: Iterable[str],
    ours: Iterable[str],
    adapter: str = "default",
    place: Place = Place(),  # noqa: B008
) -> list[Entry]:
    """Entries for the Shadow tuner of PEFT, keys as in its ``PeftModel``; ``blocks`` are the base's block paths."""
    paths, entries = list(blocks), []
    for block, path in enumerate(paths):
        for name, theirs in PEFT_INJECTION.items():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(Entry(key, f"boundaries.{name}", block, transposed=True))
        for name, theirs in PEFT_UPDATE.items() if block < len(paths) - 1 else ():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(Entry(key, f"boundaries.{name}", block, transposed=not name.endswith("biases")))
    backbone, projection = f"base_model.shadow_backbone.{adapter}.", f"base_model.shadow_projection.{adapter}."
    return entries + _renamed(ours, backbone, projection, place)


def peft_dead(blocks: Iterable[str], adapter: str = "default") -> set[str]:
    """Keys of the update after the last block, which no gradient reaches."""
    last = list(blocks)[-1]
    return {f"base_model.model.{last}.{theirs.format(adapter)}" for theirs in PEFT_UPDATE.values()}


PEFT_INJECTION = {"injection_downs": "shadow_down.{}.weight", "injection_ups": "shadow_up.{}.weight"}
PEFT_UPDATE = {
    "transform_downs": "shadow_update_transform.{}.0.weight",
    "transform_down_biases": "shadow_update_transform.{}.0.bias",
    "transform_ups": "shadow_update_transform.{}.2.weight",
    "transform_up_biases": "shadow_update_transform.{}.2.bias",
    "gate_downs": "shadow_update_gate.{}.0.weight",
    "gate_down_biases": "shadow_update_gate.{}.0.bias",
    "gate_ups": "shadow_update_gate.{}.2.weight",
    "gate_up_biases": "shadow_update_gate.{}.2.bias",
}
"""Our stacks, and what PEFT calls the tensor in each block."""


def as_peer(entries: Iterable[Entry], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights, or gradients) under the peer's keys and in the peer's layout."""
    tensors = {}
    for entry in entries:
        tensor = ours[entry.ours] if entry.slot is None else ours[entry.ours][entry.slot]
        tensors[entry.peer] = tensor.mT if entry.transposed else tensor
    return tensors


def as_ours(
    entries: Iterable[Entry],
    peer: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    ignored: Iterable[str] = (),
    source: str = "the adapter",
) -> dict[str, Tensor]:
    """The peer's tensors under our keys and in our layout; the inverse of ``as_peer``.

    Args:
        entries: what belongs to what.
        peer: the peer's tensors, under its keys.
        shapes: of our tensors.
        ignored: keys of the peer that may be there and are not read.
        source: the file, for messages.

    Raises:
        CheckpointError: if keys are missing, unexpected or of another shape.
    """
    entries = list(entries)
    expected = {entry.peer for entry in entries}
    faults = []
    for word, keys in (("has no", expected - peer.keys()), ("has unexpected", peer.keys() - expected - set(ignored))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            faults.append(f"{word} {', '.join(sorted(keys)[:3])}{more}")
    if faults:
        raise CheckpointError(f"{source} {'; '.join(faults)}: it is damaged or made for another architecture")
    ours: dict[str, Tensor] = {}
    slots: dict[str, dict[int, Tensor]] = {}
    for entry in entries:
        wanted = shapes[entry.ours] if entry.slot is None else shapes[entry.ours][1:]
        tensor = peer[entry.peer].mT if entry.transposed else peer[entry.peer]
        if tensor.shape != wanted:
            want = tuple(reversed(wanted)) if entry.transposed else tuple(wanted)
            raise CheckpointError(f"{source}: {entry.peer} has shape {tuple(peer[entry.peer].shape)}, not {want}")
        if entry.slot is None:
            ours[entry.ours] = tensor
        else:
            slots.setdefault(entry.ours, {})[entry.slot] = tensor
    return ours | {name: torch.stack([rows[slot] for slot in sorted(rows)]) for name, rows in slots.items()}


def _renamed(names: Iterable[str], backbone: str, projection: str, place: Place) -> list[Entry]:
    """Entries of backbone, projection and embedding, given the peer's prefixes."""
    entries = []
    for name in names:
        if name.startswith("backbone."):
            entries.append(Entry(f"{backbone}{place.nested}{name.removeprefix('backbone.')}", name))
        elif name.startswith("projection."):
            entries.append(Entry(f"{projection}{name.removeprefix('projection.')}", name))
        elif name == "embedding.weight":
            entries.append(Entry(f"{backbone}{place.embedding_key}", name))
    return entries
