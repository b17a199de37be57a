"""Logits of the places of a pass that choose a token, made when they are looked at."""

from collections.abc import Callable

from torch import Tensor

PLACES = 64
"""Places whose logits are made at once: of a long prediction that falls early, few are."""


class Logits:
    """Rows of logits, one for each place.

    Args:
        states: last hidden states (M, d).
        head: (..., d) -> (..., V).
    """

    def __init__(self, states: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self._states, self._head = states, head
        self._block = -1
        self._values: Tensor | None = None
        self._likeliest: list[int] = []

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """Return the logits (V,) at a place, float32, and the index of the largest."""
        block, offset = divmod(place, PLACES)
        if block != self._block or self._values is None:
            self._values = self._head(self._states[block * PLACES : (block + 1) * PLACES]).float()
            self._block, self._likeliest = block, self._values.argmax(-1).tolist()
        return self._values[offset], self._likeliest[offset]
