"""The two ways of OpenAI's API to give an answer, chat and completion: whole, or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from shadowtune.serving.http import replies
from shadowtune.serving.http.flow import Flow
from shadowtune.serving.http.logprobs import chat_logprobs, completion_logprobs
from shadowtune.serving.requests import Piece


@dataclass(frozen=True)
class Dialect:
    """How one of the two writes."""

    prefix: str
    """Of an answer's id."""
    reply: type[replies.Reply]
    chunk: type[replies.Reply]
    choice: Callable[[int, Piece], BaseModel]
    """From a choice's number and the whole of it."""
    delta: Callable[[int, Piece, int], BaseModel]
    """From a choice's number, a piece of it, and the characters of its tokens before."""
    opening: Callable[[int], BaseModel] | None = None
    """What comes before a choice's first piece."""


def _chat_choice(index: int, piece: Piece) -> BaseModel:
    return replies.ChatChoice(
        index=index,
        message=replies.ChatMessage(role="assistant", content=piece.text, refusal=None),
        logprobs=chat_logprobs(piece.tokens),
        finish_reason=piece.finish_reason,
    )


def _chat_delta(index: int, piece: Piece, offset: int) -> BaseModel:
    said = replies.Delta() if piece.finish_reason else replies.Delta(content=piece.text)
    logprobs = chat_logprobs(piece.tokens)
    return replies.ChatChunkChoice(index=index, delta=said, logprobs=logprobs, finish_reason=piece.finish_reason)


def _chat_opening(index: int) -> BaseModel:
    first = replies.Delta(role="assistant", content="")
    return replies.ChatChunkChoice(index=index, delta=first, logprobs=None, finish_reason=None)


def _completion_choice(index: int, piece: Piece, offset: int = 0) -> BaseModel:
    logprobs = completion_logprobs(piece.tokens, offset)
    return replies.CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)


CHAT = Dialect("chatcmpl-", replies.ChatReply, replies.ChatChunk, _chat_choice, _chat_delta, _chat_opening)
COMPLETION = Dialect("cmpl-", replies.CompletionReply, replies.CompletionReply, _completion_choice, _completion_choice)


@dataclass
class Writing:
    """One answer as it is written."""

    dialect: Dialect
    model: str
    include_usage: bool = False
    """Whether a stream ends with what it took."""
    _head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Give the answer its id and time."""
        name = self.dialect.prefix + uuid.uuid4().hex
        self._head = {"id": name, "created": int(time.time()), "model": self.model, "system_fingerprint": None}

    async def whole(self, flow: Flow) -> str:
        """Wait for the answer and write it as one JSON object."""
        choices = [self.dialect.choice(index, piece) for index, piece in enumerate(await flow.whole())]
        return self._write(self.dialect.reply, choices=choices, **_facts(flow), **_usage(flow))

    async def events(self, flow: Flow) -> AsyncIterator[str]:
        """Give the lines of the stream as the answer comes, the first ones with the first piece."""
        ended, offsets = 0, [0] * len(flow.requests)
        opened = False
        async for index, piece in flow.pieces():
            if not opened and self.dialect.opening is not None:
                for number in range(len(flow.requests)):
                    yield self._event([self.dialect.opening(number)])
            opened = True
            if piece.text or piece.tokens:
                told = replace(piece, finish_reason=None)
                yield self._event([self.dialect.delta(index, told, offsets[index])])
                offsets[index] += sum(len(token.text) for token in piece.tokens)
            if piece.finish_reason is not None:
                ended += 1
                last = ended == len(flow.requests) and not self.include_usage
                end = self.dialect.delta(index, Piece("", (), piece.finish_reason), offsets[index])
                yield self._event([end], **(_facts(flow) if last else {}))
        if self.include_usage:
            yield self._event([], **_usage(flow), **_facts(flow))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[BaseModel], **more: Any) -> str:
        if self.include_usage:
            more.setdefault("usage", None)
        return f"data: {self._write(self.dialect.chunk, choices=choices, **more)}\n\n"

    def _write(self, kind: type[replies.Reply], **fields: Any) -> str:
        """Write what was set, and none of the defaults; ``object`` is one that every reader wants."""
        name = kind.model_fields["object"].default
        return kind(**self._head, object=name, **fields).model_dump_json(exclude_unset=True)


def error_event(error: dict[str, Any]) -> str:
    """Return the event by which a stream that has begun says that it failed; nothing follows it."""
    return f"data: {json.dumps(error)}\n\n"


def _facts(flow: Flow) -> dict[str, Any]:
    return {"shadowtune": replies.DecisionReply.of(flow.decision)}


def _usage(flow: Flow) -> dict[str, Any]:
    usage = flow.usage
    assert usage is not None
    return {"usage": replies.UsageReply.of(usage)}
