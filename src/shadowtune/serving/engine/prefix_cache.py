"""Prefix cache: keys and values of the bare base for the beginnings of prompts, which sequences of all adapters reuse.

A prompt begins with tokens that run as in the bare base: up to ``ShadowConfig.injection_after`` for an adapter, all of
them for the base itself. Their keys and values depend on the tokens alone, so they are computed once, kept, and copied
into the slot of every sequence that begins with the same tokens. What is kept is a copy: it outlives its sequence.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

MIN_TOKENS = 16
"""Shorter prefixes are computed as fast as they are copied."""
LayerPrefix = tuple[Tensor, ...]
"""Keys and values of one layer, (1, heads, tokens, head width) each."""


class PrefixCache:
    """Keys and values of the last prefixes; the least recently used ones are dropped first.

    Args:
        max_tokens: most tokens of all prefixes together; 0 keeps none.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], list[LayerPrefix]] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        return sum(map(len, self._entries))

    def keeps(self, tokens: Sequence[int]) -> bool:
        """Whether a prefix is worth keeping, and is not kept yet."""
        size = min(len(tokens), self._max_tokens)
        return size >= MIN_TOKENS and all(common_length(tokens, known) < size for known in self._entries)

    def will_gain(self, tokens: Sequence[int], other: Sequence[int]) -> bool:
        """Whether ``tokens`` could begin with more than is kept now, once ``other`` is: with half of both or more."""
        common = min(common_length(tokens, other), self._max_tokens)
        enough = common >= MIN_TOKENS and 2 * common >= max(len(tokens), len(other))
        return enough and self.find(tokens)[0] < common

    def add(self, tokens: Sequence[int], layers: Sequence[LayerPrefix]) -> None:
        """Keep a prefix.

        Args:
            tokens: of the prefix; its first ``max_tokens`` are kept.
            layers: of the base, with at least so many tokens; they are copied.
        """
        key = tuple(tokens[: self._max_tokens])
        for known in [known for known in self._entries if common_length(known, key) == len(known)]:
            del self._entries[known]  # the longer one has it, too
        while self._entries and self.tokens + len(key) > self._max_tokens:
            self._entries.popitem(last=False)
        self._entries[key] = [tuple(part[:, :, : len(key)].clone() for part in layer) for layer in layers]

    def find(self, tokens: Sequence[int]) -> tuple[int, list[LayerPrefix]]:
        """Return the longest known beginning of ``tokens``: its length, and layers with at least so many tokens.

        The length is 0 if none of ``MIN_TOKENS`` is known.
        """
        lengths = {known: common_length(tokens, known) for known in self._entries}
        best = max(lengths, key=lambda known: lengths[known], default=())
        if lengths.get(best, 0) < MIN_TOKENS:
            return 0, []
        self._entries.move_to_end(best)
        return lengths[best], self._entries[best]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
