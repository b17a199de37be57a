"""The shadow state of one forward call."""

from typing import Any, Protocol, cast

from torch import Tensor

from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import AttachError


class Crossings(Protocol):
    """What refines a state: the ``Boundaries`` of one shadow, or those of several side by side."""

    config: ShadowConfig

    def split(self) -> list[Any]:
        """Return the parameters of each boundary."""

    def cross(
        self, parameters: Any, hidden_states: Tensor, shadow_states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Cross the boundary with these parameters: (h, s) -> (h', s')."""

    def mix(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head sees of the last hidden states and s0."""


class ShadowState:
    """s^(l) on its way through the blocks, together with the boundaries that refine it.

    One is made for each forward call and handed down as the keyword ``shadow``; nothing keeps it after the call. So
    threads do not mix, an exception leaves nothing behind, and the call alone chooses which shadow it runs with.

    Args:
        boundaries: of the shadow.
        initial: s0 (B, T, d); None where the shadow's backbone has not run, because nothing reads it.
    """

    __slots__ = ("boundaries", "depth", "given", "initial", "parameters", "value")

    def __init__(self, boundaries: Crossings, initial: Tensor | None) -> None:
        self.boundaries = boundaries
        self.parameters = boundaries.split()
        self.initial = initial
        joint = initial is None or boundaries.config.backbone_loss == "joint"
        self.given = initial if joint else cast(Tensor, initial).detach()
        """s0 as the attached model sees it."""
        self.value = self.given
        self.depth = -1
        """The block that the state has been brought to; -1 before the first."""

    def enter(self, depth: int, hidden_states: Tensor) -> Tensor:
        """Refine the state before block ``depth`` (from 0) and return that block's input, same shape and dtype.

        Entering the same block again changes nothing: several owners may have their hooks on one base.

        Raises:
            AttachError: if the blocks do not run in order, each once.
        """
        if depth == self.depth:
            return hidden_states
        if depth != self.depth + 1:
            raise AttachError(
                f"block {depth} ran after block {self.depth}: something runs the base's blocks out of order or again; "
                "to recompute them in the backward pass use model.activation_checkpointing_enable()"
            )
        self.depth = depth
        index = depth if self.boundaries.config.inject_first else depth - 1
        if index < 0:
            return hidden_states
        hidden_states, self.value = self.boundaries.cross(self.parameters[index], hidden_states, self.value)
        return hidden_states

    def arrive(self, blocks: int, hidden_states: Tensor) -> Tensor:
        """Return what the head sees, of the base's last hidden states, same shape and dtype.

        Raises:
            AttachError: unless the state has reached the last of so many blocks.
        """
        if self.depth != blocks - 1:
            raise AttachError(
                f"the shadow reached {self.depth + 1} of {blocks} blocks: this base does not hand unknown keywords "
                "down to its blocks, or skips some of them (layer dropout)"
            )
        return self.boundaries.mix(hidden_states, self.given)
