"""Serializers: output chunks to chat completions or completions, as one JSON object or as server-sent events."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from shadowtune.serving.detokenizer import REPLACEMENT
from shadowtune.serving.http.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    CompletionTokensDetails,
    FunctionCall,
    GenerationResponse,
    MessageDelta,
    ResponseMessage,
    ResponseToolCall,
    RoutingInfo,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    UsageInfo,
)
from shadowtune.serving.requests import GeneratedToken, OutputChunk, RoutingDecision, ToolCall, Usage
from shadowtune.serving.tools import ToolCallParser

MIN_LOGPROB = -9999.0
"""What OpenAI writes for the logarithm of 0, which JSON has no number for."""


class Serializer:
    """Writes the outputs of one request as a whole response, or as the events of a stream.

    Args:
        model: as the client named it.
        include_usage: whether a stream ends with the usage.
        continuous_usage: whether its other events have the usage so far.
        tools: names of the functions that may be called.
        single_call: whether only one of them may be.
        echo: texts that the choices begin with.
    """

    id_prefix: str
    response: type[GenerationResponse]
    chunk: type[GenerationResponse]

    def __init__(
        self,
        model: str,
        include_usage: bool = False,
        continuous_usage: bool = False,
        tools: Sequence[str] = (),
        single_call: bool = False,
        echo: Sequence[str] = (),
    ) -> None:
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._tools, self._single_call, self._echo = tools, single_call, echo
        name = self.id_prefix + uuid.uuid4().hex
        self._head: dict[str, Any] = {
            "id": name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._parsers: dict[int, ToolCallParser] = {}
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[OutputChunk], usage: Usage, decision: RoutingDecision) -> str:
        """Write the outputs of all choices as one JSON object."""
        choices = []
        for index, output in enumerate(outputs):
            parsed = self._parse(index, output)
            choices.append(self._choice(index, replace(parsed, text=self._echo_of(index) + parsed.text)))
        return self._json(self.response, choices=choices, usage=_usage(usage), shadowtune=_routing(decision))

    def begin(self, so_far: Sequence[Usage]) -> Iterator[str]:
        """Write the events before the first chunk, given the usage of each choice so far."""
        for index, usage in enumerate(so_far):
            if (opening := self._opening(index)) is not None:
                yield self._event([opening], **self._so_far(usage))
            if self._echo:
                yield self._event([self._delta(index, OutputChunk(self._echo[index]), 0)])

    def events(self, index: int, output: OutputChunk, so_far: Usage, last: RoutingDecision | None) -> Iterator[str]:
        """Write the events of a chunk.

        Args:
            index: of the choice.
            output: the chunk.
            so_far: usage of the choice.
            last: the decision, on the last chunk of all choices.
        """
        output, offset = self._parse(index, output), self._offsets.get(index, 0)
        more = self._so_far(so_far)
        if output.text or (output.tokens and not output.tool_calls):
            text = replace(output, finish_reason=None, tool_calls=())
            yield self._event([self._delta(index, text, offset)], **more)
            offset = self._offsets[index] = offset + sum(len(token.text) for token in output.tokens)
        if output.tool_calls:
            calls = OutputChunk("", () if output.text else output.tokens, tool_calls=output.tool_calls)
            yield self._event([self._delta(index, calls, offset)], **more)
        if output.finish_reason is not None:
            if last is not None and not self._include_usage:
                more |= {"shadowtune": _routing(last)}
            yield self._event([self._delta(index, OutputChunk("", (), output.finish_reason), offset)], **more)

    def end(self, usage: Usage, decision: RoutingDecision) -> Iterator[str]:
        """Write the events after the last chunk."""
        if self._include_usage:
            yield self._event([], usage=_usage(usage), shadowtune=_routing(decision))
        yield "data: [DONE]\n\n"

    def _choice(self, index: int, output: OutputChunk) -> BaseModel:
        """Make the choice of a whole response."""
        raise NotImplementedError

    def _delta(self, index: int, output: OutputChunk, offset: int) -> BaseModel:
        """Make the choice of an event, ``offset`` characters after the start of the output."""
        raise NotImplementedError

    def _opening(self, index: int) -> BaseModel | None:
        """Make the choice of the event before a choice's first chunk, if there is one."""
        return None

    def _echo_of(self, index: int) -> str:
        return self._echo[index] if self._echo else ""

    def _parse(self, index: int, output: OutputChunk) -> OutputChunk:
        if not self._tools:
            return output
        if index not in self._parsers:
            self._parsers[index] = ToolCallParser(self._tools, self._single_call)
        return self._parsers[index].parse(output)

    def _so_far(self, usage: Usage) -> dict[str, Any]:
        return {"usage": _usage(usage)} if self._continuous_usage else {}

    def _event(self, choices: list[BaseModel], **more: Any) -> str:
        if self._include_usage:
            more.setdefault("usage", None)
        return f"data: {self._json(self.chunk, choices=choices, **more)}\n\n"

    def _json(self, kind: type[GenerationResponse], **fields: Any) -> str:
        """Write the fields that were set, and ``object``, but no other default."""
        name = kind.model_fields["object"].default
        return kind(**self._head, object=name, **fields).model_dump_json(exclude_unset=True)


class ChatSerializer(Serializer):
    """Writes chat completions."""

    id_prefix, response, chunk = "chatcmpl-", ChatCompletionResponse, ChatCompletionChunk

    def _choice(self, index: int, output: OutputChunk) -> BaseModel:
        calls = [_tool_call(call) for call in _join_calls(output.tool_calls)]
        content = None if calls and not output.text else output.text
        message = ResponseMessage(role="assistant", content=content, refusal=None)
        if calls:
            message = ResponseMessage(role="assistant", content=content, refusal=None, tool_calls=calls)
        logprobs = _chat_logprobs(output.tokens)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=output.finish_reason)

    def _delta(self, index: int, output: OutputChunk, offset: int) -> BaseModel:
        delta = MessageDelta() if output.finish_reason else MessageDelta(content=output.text)
        if output.tool_calls:
            delta = MessageDelta(tool_calls=[_tool_call_delta(call) for call in output.tool_calls])
        logprobs = _chat_logprobs(output.tokens)
        return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=output.finish_reason)

    def _opening(self, index: int) -> BaseModel:
        delta = MessageDelta(role="assistant", content="")
        return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


class CompletionSerializer(Serializer):
    """Writes completions."""

    id_prefix, response, chunk = "cmpl-", CompletionResponse, CompletionResponse

    def _choice(self, index: int, output: OutputChunk) -> BaseModel:
        return self._delta(index, output, 0)

    def _delta(self, index: int, output: OutputChunk, offset: int) -> BaseModel:
        logprobs = _completion_logprobs(output.tokens, offset)
        return CompletionChoice(index=index, text=output.text, logprobs=logprobs, finish_reason=output.finish_reason)


def _usage(usage: Usage) -> UsageInfo:
    details = CompletionTokensDetails(
        accepted_prediction_tokens=usage.accepted_prediction_tokens,
        rejected_prediction_tokens=usage.rejected_prediction_tokens,
    )
    return UsageInfo(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        completion_tokens_details=details,
    )


def _routing(decision: RoutingDecision) -> RoutingInfo:
    return RoutingInfo(**vars(decision))


def _tool_call(call: ToolCall) -> ResponseToolCall:
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ResponseToolCall(id=call.id, type="function", function=function)


def _tool_call_delta(call: ToolCall) -> ToolCallDelta:
    """Write a part of a call; its first one has id and name."""
    if call.id is None and call.name is None:
        return ToolCallDelta(index=call.index, function=FunctionCall(arguments=call.arguments))
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ToolCallDelta(index=call.index, id=call.id, type="function", function=function)


def _join_calls(parts: Sequence[ToolCall]) -> list[ToolCall]:
    """Concatenate the parts of each call."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        known = calls.get(part.index)
        calls[part.index] = part if known is None else replace(known, arguments=known.arguments + part.arguments)
    return [calls[index] for index in sorted(calls)]


def _chat_logprobs(tokens: Sequence[GeneratedToken]) -> ChatLogprobs | None:
    if not tokens:
        return None
    content = []
    for token in tokens:
        top = [TopLogprob(token=text, logprob=_finite(value), bytes=_bytes(text)) for _, text, value in token.top]
        one = TokenLogprob(token=token.text, logprob=_finite(token.logprob), bytes=_bytes(token.text), top_logprobs=top)
        content.append(one)
    return ChatLogprobs(content=content, refusal=None)


def _completion_logprobs(tokens: Sequence[GeneratedToken], offset: int) -> CompletionLogprobs | None:
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
    return max(logprob, MIN_LOGPROB)


def _bytes(text: str) -> list[int] | None:
    return None if REPLACEMENT in text else list(text.encode())
