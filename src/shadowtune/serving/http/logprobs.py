"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Sequence

from pydantic import BaseModel

from shadowtune.serving.requests import Token
from shadowtune.serving.wording import REPLACEMENT

LOWEST = -9999.0
"""What OpenAI writes for the logarithm of a probability of 0, which JSON has no number for."""


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8; None for a part of a character."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs | None:
    """Write tokens as the chat API does; None if they are not told."""
    if not tokens:
        return None
    content = []
    for token in tokens:
        top = [TopLogprob(token=text, logprob=_finite(value), bytes=_bytes(text)) for _, text, value in token.top]
        one = TokenLogprob(token=token.text, logprob=_finite(token.logprob), bytes=_bytes(token.text), top_logprobs=top)
        content.append(one)
    return ChatLogprobs(content=content, refusal=None)


def completion_logprobs(tokens: Sequence[Token], offset: int) -> CompletionLogprobs | None:
    """Write tokens as the completions API does, the first one ``offset`` characters from the start; or None."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[_finite(token.logprob) for token in tokens],
        top_logprobs=[{text: _finite(value) for _, text, value in token.top} for token in tokens],
        text_offset=offsets,
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _bytes(text: str) -> list[int] | None:
    return None if REPLACEMENT in text else list(text.encode())
