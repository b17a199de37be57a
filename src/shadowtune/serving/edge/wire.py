"""Our requests in OpenAI's words, and OpenAI's chunks as our pieces."""

import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from shadowtune.serving.edge.breaker import CloudError
from shadowtune.serving.edge.events import BROKE_OFF, GARBAGE, ODD
from shadowtune.serving.requests import FinishReason, Piece, Request, Sampling, Token, ToolCall, Usage

UNKNOWN = -1
"""Id of a token of which OpenAI's API tells the text alone."""
MOST_TOKENS = 2**31
"""Counts of tokens lie below it."""
_PLAIN = Sampling()


def path_of(request: Request) -> str:
    """Return where a request goes, under ``/v1``."""
    return "/completions" if request.messages is None else "/chat/completions"


def body_of(request: Request, model: str, predicts: bool = True) -> dict[str, Any]:
    """Return the JSON body of a request. What is as OpenAI has it by default is left out, for servers that know less.

    Args:
        request: what is asked.
        model: what the server calls it.
        predicts: whether the server knows predictions.
    """
    sampling, chat = request.sampling, request.messages is not None
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"messages": list(request.messages or ())} if chat else {"prompt": _plain(request.prompt)}
    body |= {name: value for name, value in vars(sampling).items() if value != vars(_PLAIN)[name]}
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    body |= request.forwarded
    if request.fields:
        body["fields"] = dict(request.fields)
    if request.tools:
        body["tools"] = list(request.tools)
    if request.max_tokens is not None and not request.fitting and "max_completion_tokens" not in body:
        body["max_tokens"] = request.max_tokens
    if request.schema is not None and not body.keys() & {"response_format", "tools"}:
        named = {"name": "answer", "schema": dict(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if request.min_tokens:
        body["min_tokens"] = request.min_tokens
    if request.stop_tokens:
        body["stop_token_ids"] = list(request.stop_tokens)
    if request.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(request.chat_template_kwargs)
    if request.stop:
        body["stop"] = list(request.stop)
    if request.ignore_eos:
        body["ignore_eos"] = True
    if not request.speculate:
        body["speculate"] = False
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs} if chat else {"logprobs": request.top_logprobs}
    if predicts and isinstance(request.prediction, str) and request.prediction:
        body["prediction"] = {"type": "content", "content": request.prediction}
    return body


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


async def pieces(objects: AsyncIterator[dict[str, Any]], told: bool) -> AsyncIterator[Piece]:
    """Turn a stream's objects into pieces, those without any news left out; the last has reason and usage.

    Args:
        objects: as ``events`` gives them.
        told: whether tokens were asked for.

    Raises:
        CloudError: if they are not OpenAI's chunks, or end before the answer does.
    """
    reason, usage, count, held = None, None, 0, ""
    last: tuple[Token, ...] = ()
    called: tuple[ToolCall, ...] = ()
    async for chunk in objects:
        try:
            usage = _usage(chunk["usage"]) if chunk.get("usage") else usage
            for choice in chunk["choices"]:
                text, tokens = _said(choice), _tokens(choice.get("logprobs")) if told else ()
                calls = _calls(choice)
                reason = reason or _text(choice.get("finish_reason") or "") or None
                count += bool(text or calls)
                if reason:  # what comes with the end goes out with it
                    held += text
                    last += tokens
                    called += calls
                elif text or tokens or calls:
                    yield Piece(text, tokens, tool_calls=calls)
        except ODD:
            raise CloudError(GARBAGE, "a chunk is not as OpenAI's API has it") from None
    if reason is None:
        raise CloudError(BROKE_OFF, "its answer has no end")
    end: FinishReason = "length" if reason == "length" else "tool_calls" if reason == "tool_calls" else "stop"
    yield Piece(held, last, end, usage or Usage(0, count), called)


def _text(value: Any) -> str:
    """A text that can be sent on; raises TypeError, or ValueError for half characters."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return value


def _number(value: Any) -> float:
    """A finite number; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    number = float(value)
    if math.isnan(number) or number == math.inf:
        raise ValueError
    return number


def _count(value: Any) -> int:
    """A number of tokens; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if not 0 <= value < MOST_TOKENS:
        raise ValueError
    return value


def _said(choice: Mapping[str, Any]) -> str:
    said = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return "" if said is None else _text(said)


def _calls(choice: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Read the parts of tool calls of a chunk."""
    parts = (choice.get("delta") or {}).get("tool_calls") or ()
    calls = []
    for part in parts:
        function = part.get("function") or {}
        name, known = function.get("name"), part.get("id")
        calls.append(
            ToolCall(
                _count(part.get("index", 0)),
                _text(function.get("arguments") or ""),
                None if known is None else _text(known),
                None if name is None else _text(name),
            )
        )
    return tuple(calls)


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("completion_tokens_details") or {}
    return Usage(
        _count(usage["prompt_tokens"]),
        _count(usage.get("completion_tokens") or 0),
        _count(details.get("accepted_prediction_tokens") or 0),
        _count(details.get("rejected_prediction_tokens") or 0),
    )


def _tokens(logprobs: Mapping[str, Any] | None) -> tuple[Token, ...]:
    """Read the tokens of a chunk, in the shape of either API."""
    if not logprobs:
        return ()
    if "content" in logprobs:
        return tuple(
            Token(
                UNKNOWN,
                _text(entry["token"]),
                _number(entry["logprob"]),
                tuple(_likely((other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ())),
            )
            for entry in logprobs["content"] or ()
        )
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return tuple(
        Token(UNKNOWN, _text(text), _number(logprob), tuple(_likely((top or {}).items())))
        for text, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    )


def _likely(entries: Any) -> list[tuple[int, str, float]]:
    return [(UNKNOWN, _text(text), _number(logprob)) for text, logprob in entries]
