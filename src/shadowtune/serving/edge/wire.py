"""Our requests in OpenAI's words, and OpenAI's chunks as our pieces."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from shadowtune.serving.edge.breaker import CloudError
from shadowtune.serving.edge.events import BROKE_OFF, GARBAGE
from shadowtune.serving.requests import Piece, Request, Sampling, Token, Usage

UNKNOWN = -1
"""Id of a token of which OpenAI's API tells the text alone."""
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
    extra = {
        "fields": request.fields,
        "tools": request.tools,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    body |= {name: value for name, value in extra.items() if value}
    if request.max_tokens is not None and not request.fitting:
        body["max_tokens"] = request.max_tokens
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
    async for chunk in objects:
        try:
            usage = _usage(chunk["usage"]) if chunk.get("usage") else usage
            for choice in chunk["choices"]:
                text, tokens = _said(choice), _tokens(choice.get("logprobs")) if told else ()
                reason = reason or choice.get("finish_reason")
                count += bool(text)
                if reason:  # what comes with the end goes out with it
                    held += text
                    last += tokens
                elif text or tokens:
                    yield Piece(text, tokens)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            raise CloudError(GARBAGE, "a chunk is not as OpenAI's API has it") from None
    if reason is None:
        raise CloudError(BROKE_OFF, "its answer has no end")
    yield Piece(held, last, "length" if reason == "length" else "stop", usage or Usage(0, count))


def _said(choice: Mapping[str, Any]) -> str:
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError
    return text or ""


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("completion_tokens_details") or {}
    return Usage(
        int(usage["prompt_tokens"]),
        int(usage.get("completion_tokens") or 0),
        int(details.get("accepted_prediction_tokens") or 0),
        int(details.get("rejected_prediction_tokens") or 0),
    )


def _tokens(logprobs: Mapping[str, Any] | None) -> tuple[Token, ...]:
    """Read the tokens of a chunk, in the shape of either API."""
    if not logprobs:
        return ()
    if "content" in logprobs:
        return tuple(
            Token(
                UNKNOWN,
                str(entry["token"]),
                float(entry["logprob"]),
                tuple(_likely((other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ())),
            )
            for entry in logprobs["content"] or ()
        )
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return tuple(
        Token(UNKNOWN, str(text), float(logprob), tuple(_likely((top or {}).items())))
        for text, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    )


def _likely(entries: Any) -> list[tuple[int, str, float]]:
    return [(UNKNOWN, str(text), float(logprob)) for text, logprob in entries]
