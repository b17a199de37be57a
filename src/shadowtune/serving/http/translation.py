"""From a body of OpenAI's API to the requests it means: one for each prompt and each of its ``n`` answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shadowtune.serving.http.bodies import (
    Asked,
    ChatBody,
    CompletionBody,
    Message,
    ObjectFormat,
    SchemaFormat,
    TokenizeBody,
    ToolChoice,
    text_of,
)
from shadowtune.serving.requests import Request, RequestError, Sampling
from shadowtune.serving.tools import call_schema

COMPLETION_TOKENS = 16
"""What OpenAI's completions API takes for ``max_tokens`` where nothing is said."""
COLDEST = 1e-3
"""A temperature below it takes the likeliest token: dividing by it would overflow."""
FORWARDED = ("max_completion_tokens", "response_format", "tools", "tool_choice", "parallel_tool_calls")
"""Fields that a remote endpoint gets as they came."""


def chat_requests(body: ChatBody, limit: int | None, owner: str = "") -> list[Request]:
    """Return a request for each answer wanted.

    Args:
        body: of ``/v1/chat/completions``.
        limit: tokens that may be asked for; None for any number.
        owner: who asks.

    Raises:
        RequestError: if more tokens are asked for.
    """
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    choice: Any = body.tool_choice
    source = {
        "messages": [_message(turn) for turn in body.messages],
        "tools": tuple(dict(tool) for tool in body.tools or ()),
        "tool_choice": choice.model_dump() if isinstance(choice, ToolChoice) else choice,
        "chat_template_kwargs": dict(body.chat_template_kwargs or {}),
        "fields": dict(body.fields or {}),
        "schema": _chat_schema(body),
        "forwarded": _forwarded(body),
    }
    return list(_choices(body, [source], _allowed(asked, limit, limit), top, owner))


def completion_requests(
    body: CompletionBody, limit: int | None, owner: str = "", most: int | None = None
) -> list[Request]:
    """Return a request for each answer wanted, the ``n`` of each prompt beside one another.

    Args:
        body: of ``/v1/completions``.
        limit: tokens that may be asked for; None for any number.
        owner: who asks.
        most: answers that may be asked for; None for any number.

    Raises:
        RequestError: if more tokens or answers are asked for.
    """
    prompt: Any = body.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if single else prompt
    count = len(prompts) * (body.n or 1)
    if most is not None and count > most:
        raise RequestError(f"{count} answers at once are more than this server's {most}; ask for fewer")
    schema, forwarded = _schema(body), _forwarded(body)
    sources = [{"prompt": one, "schema": schema, "forwarded": forwarded} for one in prompts]
    usual = COMPLETION_TOKENS if limit is None else min(limit, COMPLETION_TOKENS)
    return list(_choices(body, sources, _allowed(body.max_tokens, limit, usual), body.logprobs, owner))


def tokenize_request(body: TokenizeBody) -> Request:
    """Return a request whose prompt is that of ``/tokenize``."""
    return Request(
        body.model,
        messages=None if body.messages is None else [_message(turn) for turn in body.messages],
        prompt=body.prompt,
        tools=tuple(dict(tool) for tool in body.tools or ()),
        chat_template_kwargs=dict(body.chat_template_kwargs or {}),
    )


def _message(turn: Message) -> dict[str, Any]:
    """A message as a remote endpoint or a chat template takes it."""
    told: dict[str, Any] = {"role": turn.role, "content": None if turn.content is None else text_of(turn.content)}
    if turn.tool_calls:
        told["tool_calls"] = [call.model_dump(exclude_none=True) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        told["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        told["name"] = turn.name
    return told


def _chat_schema(body: ChatBody) -> Mapping[str, Any] | None:
    """The schema of the answer: of a tool's call, where one must come, or of the format that was asked for."""
    tools = body.tools or []
    if isinstance(body.tool_choice, ToolChoice):
        name = body.tool_choice.function.name
        return call_schema(tool for tool in tools if tool["function"]["name"] == name)
    if body.tool_choice == "required":
        return call_schema(tools)
    schema = _schema(body)
    if schema is None or not tools or body.tool_choice == "none":
        return schema
    return {"anyOf": [call_schema(tools), schema]}


def _schema(body: Asked) -> Mapping[str, Any] | None:
    if isinstance(body.response_format, ObjectFormat):
        return {"type": "object"}
    return body.response_format.json_schema.schema_ if isinstance(body.response_format, SchemaFormat) else None


def _forwarded(body: Asked) -> dict[str, Any]:
    sent = body.model_dump(include=set(FORWARDED), exclude_unset=True, by_alias=True)
    return {name: value for name, value in sent.items() if value is not None and value != []}


def _allowed(asked: int | None, limit: int | None, usual: int | None) -> dict[str, Any]:
    """The tokens of the answer: as many as asked for, or at most ``usual`` where nothing is said."""
    if asked is None:
        return {"max_tokens": usual, "fitting": True}
    if limit is not None and asked > limit:
        raise RequestError(f"max_tokens {asked} is more than this server's {limit}; ask for fewer", param="max_tokens")
    return {"max_tokens": asked}


def _choices(
    body: Asked, sources: Sequence[dict[str, Any]], length: dict[str, Any], top_logprobs: int | None, owner: str
) -> Iterable[Request]:
    """Give every prompt ``n`` times; with a seed, each of them draws from one of its own."""
    sampling = _sampling(body)
    prediction = None if body.prediction is None else text_of(body.prediction.content)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    for source in sources:
        for choice in range(body.n or 1):
            seed = None if sampling.seed is None else sampling.seed + choice
            yield Request(
                model=body.model,
                sampling=replace(sampling, seed=seed),
                stop=stop,
                ignore_eos=bool(body.ignore_eos),
                top_logprobs=top_logprobs,
                prediction=prediction,
                speculate=body.speculate is not False,
                stop_tokens=tuple(body.stop_token_ids or ()),
                min_tokens=body.min_tokens or 0,
                owner=owner,
                **length,
                **source,
            )


def _sampling(body: Asked) -> Sampling:
    def said(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    temperature = said(body.temperature, 1.0)
    return Sampling(
        temperature=0.0 if temperature < COLDEST else temperature,
        top_p=said(body.top_p, 1.0),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        min_p=body.min_p,
        presence_penalty=said(body.presence_penalty, 0.0),
        frequency_penalty=said(body.frequency_penalty, 0.0),
        repetition_penalty=None if body.repetition_penalty is None else float(body.repetition_penalty),
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
    )
