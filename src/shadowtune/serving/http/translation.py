"""From a body of OpenAI's API to the requests it means: one for each prompt and each of its ``n`` answers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from shadowtune.serving.http.bodies import Asked, ChatBody, CompletionBody, text_of
from shadowtune.serving.requests import Request, RequestError, Sampling

COMPLETION_TOKENS = 16
"""What OpenAI's completions API takes for ``max_tokens`` where nothing is said."""
COLDEST = 1e-3
"""A temperature below it takes the likeliest token: dividing by it would overflow."""
ROLES = {"developer": "system"}
"""Roles that chat templates know by another name."""


def chat_requests(body: ChatBody, limit: int | None) -> list[Request]:
    """Return a request for each answer wanted.

    Args:
        body: of ``/v1/chat/completions``.
        limit: tokens that may be asked for; None for any number.

    Raises:
        RequestError: if more tokens are asked for.
    """
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [{"role": ROLES.get(turn.role, turn.role), "content": text_of(turn.content)} for turn in body.messages]
    top = (body.top_logprobs or 0) if body.logprobs else None
    source = {"messages": messages, "fields": body.fields, "chat_template_kwargs": body.chat_template_kwargs}
    return list(_choices(body, [source], _allowed(asked, limit, limit), top))


def completion_requests(body: CompletionBody, limit: int | None) -> list[Request]:
    """Return a request for each answer wanted, the ``n`` of each prompt beside one another.

    Args:
        body: of ``/v1/completions``.
        limit: tokens that may be asked for; None for any number.

    Raises:
        RequestError: if more tokens are asked for.
    """
    prompt: Any = body.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    sources = [{"prompt": one} for one in ([prompt] if single else prompt)]
    usual = COMPLETION_TOKENS if limit is None else min(limit, COMPLETION_TOKENS)
    return list(_choices(body, sources, _allowed(body.max_tokens, limit, usual), body.logprobs))


def _allowed(asked: int | None, limit: int | None, usual: int | None) -> dict[str, Any]:
    """The tokens of the answer: as many as asked for, or at most ``usual`` where nothing is said."""
    if asked is None:
        return {"max_tokens": usual, "fitting": True}
    if limit is not None and asked > limit:
        raise RequestError(f"max_tokens {asked} is more than this server's {limit}; ask for fewer", param="max_tokens")
    return {"max_tokens": asked}


def _choices(
    body: Asked, sources: Sequence[dict[str, Any]], length: dict[str, Any], top_logprobs: int | None
) -> Iterable[Request]:
    """Give every prompt ``n`` times; with a seed, each of them draws from one of its own."""
    sampling = _sampling(body)
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
                prediction=None if body.prediction is None else text_of(body.prediction.content),
                speculate=body.speculate is not False,
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
