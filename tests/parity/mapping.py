"""Which of our tensors is which of a peer's. One entry names one tensor of the peer; weights and gradients go alike.

Both peers store one module per block and weights as (outputs, inputs); we stack over boundaries and store
(inputs, outputs). Our boundary j > 0 updates the state with the output of a block and keeps its parameters in slot
j - 1, so slot j of ours is slot j of shadow-peft and block j of PEFT. Both peers own one more update, after the last
block: nobody reads what it computes.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    peer: str
    """Key in the peer's model."""
    ours: str
    """Key in our ``Shadow``."""
    slot: int | None = None
    """Row of our stack; None where the whole tensor is meant."""
    transposed: bool = False


def shadow_peft_entries(boundaries: int, ours: Iterable[str]) -> list[Entry]:
    """Entries for shadow-peft 0.1.1, keys as in its ``ShadowPeftModel``; ``ours`` are the keys of our shadow."""
    injection, update = "shadow_injection_model", "shadow_update_model"
    entries = [
        Entry(f"{injection}.injection_downs", "boundaries.injection_downs"),
        Entry(f"{injection}.injection_ups", "boundaries.injection_ups"),
        Entry(f"{update}.hidden_norm.weight", "boundaries.norm_weight"),
        Entry(f"{update}.hidden_norm.bias", "boundaries.norm_bias"),
    ]
    for slot in range(boundaries - 1):
        for name, theirs in SHADOW_PEFT_UPDATE.items():
            entries.append(Entry(f"{update}.{theirs.format(slot)}", f"boundaries.{name}", slot, transposed=True))
    prefixes = {"backbone.": "shadow_model.", "projection.": "shadow_hidden_projection."}
    return entries + _renamed(ours, {**prefixes, "embedding.": "shadow_model.embed_tokens."})


def shadow_peft_dead(boundaries: int) -> set[str]:
    """Keys of the update after the last block, which no gradient reaches."""
    return {f"shadow_update_model.{theirs.format(boundaries - 1)}" for theirs in SHADOW_PEFT_UPDATE.values()}


SHADOW_PEFT_UPDATE = {
    "transform_downs": "update_transforms.{}.0.weight",
    "transform_ups": "update_transforms.{}.3.weight",
    "gate_downs": "update_gates.{}.0.weight",
    "gate_ups": "update_gates.{}.2.weight",
}
"""Our stacks of the update, and what shadow-peft calls each slot."""


def peft_entries(blocks: Iterable[str], ours: Iterable[str], adapter: str = "default") -> list[Entry]:
    """Entries for the Shadow tuner of PEFT, keys as in its ``PeftModel``; ``blocks`` are the base's block paths."""
    paths, entries = list(blocks), []
    for block, path in enumerate(paths):
        for name, theirs in PEFT_INJECTION.items():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(Entry(key, f"boundaries.{name}", block, transposed=True))
        for name, theirs in PEFT_UPDATE.items() if block < len(paths) - 1 else ():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(Entry(key, f"boundaries.{name}", block, transposed=not name.endswith("biases")))
    backbone = f"base_model.shadow_backbone.{adapter}."
    prefixes = {"backbone.": backbone, "projection.": f"base_model.shadow_projection.{adapter}."}
    return entries + _renamed(ours, {**prefixes, "embedding.": f"{backbone}embed_tokens."})


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
        tensors[entry.peer] = tensor.T if entry.transposed else tensor
    return tensors


def _renamed(names: Iterable[str], prefixes: Mapping[str, str]) -> list[Entry]:
    return [
        Entry(theirs + name.removeprefix(ours), name)
        for name in names
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    ]
