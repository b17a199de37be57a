"""From tokens to text, piece by piece: half characters wait for their other half, and stop texts are held back."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"
"""What a decoder writes for a part of a character."""


class Wording:
    """The text of one answer while its tokens come.

    Args:
        tokenizer: of transformers.
        stop: texts that end the answer and are not part of it.
        min_tokens: tokens in whose text no stop text is looked for.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._begun = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text has come; nothing may follow."""

    def add(self, token: int) -> str:
        """Take the next token and return the text that stands now, mostly that of the token."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._begun : self._read])
        longer = self._decode(self._tokens[self._begun :])
        if len(longer) <= len(known) or longer.endswith(REPLACEMENT):
            return self._release("")
        self._begun, self._read = self._read, len(self._tokens)
        return self._release(longer[len(known) :])

    def say(self, text: str) -> str:
        """Take what comes next as text, where another has put the tokens together, and return what stands now."""
        return self._release(text)

    def end(self) -> str:
        """Return what was held back, the answer being at its end."""
        known = self._decode(self._tokens[self._begun : self._read])
        rest = "" if self.stopped else self._release(self._decode(self._tokens[self._begun :])[len(known) :])
        held, self._held = self._held, ""
        return rest + held

    def _release(self, text: str) -> str:
        """Add text to what is held, and give what can no longer be the start of a stop text."""
        if self.stopped:
            return ""
        self._held += text
        if len(self._tokens) < self._min_tokens:
            said, self._held = self._held, ""
            return said
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            said, self._held, self.stopped = self._held[: min(places)], "", True
            return said
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        said, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return said

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest start of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
