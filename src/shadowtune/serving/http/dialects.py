"""The two ways of OpenAI's API to give an answer, chat and completion: whole, or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from shadowtune.serving.http import replies
from shadowtune.serving.http.flow import Flow
from shadowtune.serving.http.logprobs import chat_logprobs, completion_logprobs
from shadowtune.serving.requests import Piece, ToolCall
from shadowtune.serving.tools import CallReader


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
    calls = [replies.ToolCallReply.of(call) for call in _whole_calls(piece.tool_calls)]
    content = None if calls and not piece.text else piece.text
    message = replies.ChatMessage(role="assistant", content=content, refusal=None)
    if calls:
        message = replies.ChatMessage(role="assistant", content=content, refusal=None, tool_calls=calls)
    return replies.ChatChoice(
        index=index,
        message=message,
        logprobs=chat_logprobs(piece.tokens),
        finish_reason=piece.finish_reason,
    )


def _chat_delta(index: int, piece: Piece, offset: int) -> BaseModel:
    said = replies.Delta() if piece.finish_reason else replies.Delta(content=piece.text)
    if piece.tool_calls:
        said = replies.Delta(tool_calls=[replies.ToolCallDelta.of(call) for call in piece.tool_calls])
    logprobs = chat_logprobs(piece.tokens)
    return replies.ChatChunkChoice(index=index, delta=said, logprobs=logprobs, finish_reason=piece.finish_reason)


def _whole_calls(parts: Sequence[ToolCall]) -> list[ToolCall]:
    """Put the parts of each call together."""
    whole: dict[int, ToolCall] = {}
    for part in parts:
        known = whole.get(part.index)
        whole[part.index] = part if known is None else replace(known, arguments=known.arguments + part.arguments)
    return [whole[index] for index in sorted(whole)]


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
    running_usage: bool = False
    """Whether its other events tell what it took so far."""
    tools: tuple[str, ...] = ()
    """Names of the functions that may be called."""
    single_call: bool = False
    """Whether only one of them may be."""
    echo: tuple[str, ...] = ()
    """What each choice begins with."""
    _head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Give the answer its id and time."""
        name = self.dialect.prefix + uuid.uuid4().hex
        self._head = {"id": name, "created": int(time.time()), "model": self.model, "system_fingerprint": None}

    async def whole(self, flow: Flow) -> str:
        """Wait for the answer and write it as one JSON object."""
        choices = []
        for index, piece in enumerate(await flow.whole()):
            read = self._reader().read(piece) if self.tools else piece
            said = replace(read, text=self.echo[index] + read.text) if self.echo else read
            choices.append(self.dialect.choice(index, said))
        return self._write(self.dialect.reply, choices=choices, **_facts(flow), **_usage(flow))

    async def events(self, flow: Flow) -> AsyncIterator[str]:
        """Give the lines of the stream as the answer comes, the first ones with the first piece."""
        ended, offsets = 0, [0] * len(flow.requests)
        readers = [self._reader() for _ in flow.requests]
        opened = False
        async for index, given in flow.pieces():
            if not opened:
                for line in self._openings(flow):
                    yield line
            opened = True
            piece = readers[index].read(given) if self.tools else given
            running = self._running(flow, index)
            if piece.text or (piece.tokens and not piece.tool_calls):
                told = replace(piece, finish_reason=None, tool_calls=())
                yield self._event([self.dialect.delta(index, told, offsets[index])], **running)
                offsets[index] += sum(len(token.text) for token in piece.tokens)
            if piece.tool_calls:
                told = Piece("", () if piece.text else piece.tokens, tool_calls=piece.tool_calls)
                yield self._event([self.dialect.delta(index, told, offsets[index])], **running)
            if piece.finish_reason is not None:
                ended += 1
                last = ended == len(flow.requests) and not self.include_usage
                end = self.dialect.delta(index, Piece("", (), piece.finish_reason), offsets[index])
                yield self._event([end], **running, **(_facts(flow) if last else {}))
        if self.include_usage:
            yield self._event([], **_usage(flow), **_facts(flow))
        yield "data: [DONE]\n\n"

    def _reader(self) -> CallReader:
        return CallReader(self.tools, self.single_call)

    def _openings(self, flow: Flow) -> list[str]:
        """What comes before the first piece."""
        lines = []
        for number in range(len(flow.requests)):
            if self.dialect.opening is not None:
                lines.append(self._event([self.dialect.opening(number)], **self._running(flow, number)))
            if self.echo:
                lines.append(self._event([self.dialect.delta(number, Piece(self.echo[number]), 0)]))
        return lines

    def _running(self, flow: Flow, index: int) -> dict[str, Any]:
        """The usage so far of one choice, if every event is to tell it."""
        if not self.running_usage:
            return {}
        return {"usage": replies.UsageReply.of(flow.running_usage(index))}

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
