"""Incremental detokenization: tokens to text as they are generated, with stop strings."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"
"""What a tokenizer decodes an incomplete character to."""


class IncrementalDetokenizer:
    """Decodes one output token by token.

    Incomplete characters are held back until they are complete, and so is text that may be the start of a stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stop: stop strings, which end the output and are not part of it.
        min_tokens: number of first tokens in whose text no stop string is searched.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._prefix_offset = self._read_offset = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; no more text follows."""

    def add(self, token: int) -> str:
        """Add the next token and return the text that is now complete, usually that of the token."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._prefix_offset : self._read_offset])
        longer = self._decode(self._tokens[self._prefix_offset :])
        if len(longer) <= len(known) or longer.endswith(REPLACEMENT):
            return self.add_text("")
        self._prefix_offset, self._read_offset = self._read_offset, len(self._tokens)
        return self.add_text(longer[len(known) :])

    def add_text(self, text: str) -> str:
        """Add text that is decoded already and return what can no longer be the start of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        end = len(text)
        if len(self._tokens) >= self._min_tokens:
            matches = [index for stop in self._stop if (index := text.find(stop)) >= 0]
            if matches:
                self._held, self.stopped = "", True
                return text[: min(matches)]
            end -= max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the text held back, at the end of the output."""
        known = self._decode(self._tokens[self._prefix_offset : self._read_offset])
        rest = "" if self.stopped else self.add_text(self._decode(self._tokens[self._prefix_offset :])[len(known) :])
        held, self._held = self._held, ""
        return rest + held

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
