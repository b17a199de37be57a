"""The shadow state of one forward call."""

from torch import Tensor

from shadowtune.core.boundary import Boundaries


class ShadowState:
    """s^(l) on its way through the blocks, together with the boundaries that refine it.

    One is made for each forward call and handed down as the keyword ``shadow``; nothing keeps it after the call. So
    threads do not mix, an exception leaves nothing behind, and the call alone chooses which shadow it runs with.
    """

    __slots__ = ("boundaries", "initial", "value")

    def __init__(self, boundaries: Boundaries, initial: Tensor) -> None:
        self.boundaries = boundaries
        self.initial = initial
        self.value = initial

    def enter(self, depth: int, hidden_states: Tensor) -> Tensor:
        """Refine the state before block ``depth`` (from 0) and return that block's input, same shape and dtype."""
        index = depth if self.boundaries.config.inject_first else depth - 1
        if index < 0:
            return hidden_states
        hidden_states, self.value = self.boundaries(index, hidden_states, self.value)
        return hidden_states
