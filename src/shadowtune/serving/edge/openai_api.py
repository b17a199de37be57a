"""OpenAI's wire format as a client sees it: request bodies out of requests, output chunks out of streamed JSON.

The private pydantic models are the part of the format that is read. They are strict: a wrong type, a number that is not
finite or a text that cannot be encoded is an error here, and not later.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from shadowtune.serving.requests import (
    GeneratedToken,
    GenerationRequest,
    OutputChunk,
    RequestError,
    SamplingParams,
    ToolCall,
    Usage,
)

GARBAGE = "cloud sent garbage"
BROKE_OFF = "cloud broke off"
UNKNOWN = -1
"""Id of a token of which the API gives the text alone."""
_DEFAULTS = vars(SamplingParams())
Count = Annotated[int, Field(ge=0, lt=2**31)]


class RemoteError(RequestError):
    """A remote endpoint that cannot be reached, refuses a request, or sends an invalid response.

    Args:
        reason: a few words, as ``Decision.reason`` reports them.
        detail: more, for the message.
        status: the HTTP status to report to the client.
        http_status: the status of the endpoint's own response, if that is the error.
        retry_after: seconds that the endpoint asks to wait.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        status: int = 502,
        http_status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason + (f": {detail}" if detail else ""), status)
        self.reason, self.http_status, self.retry_after = reason, http_status, retry_after


def refusal(status: int, detail: str, retry_after: float | None = None) -> RemoteError:
    """Return the error of a request that the endpoint refused with an HTTP status."""
    reason = "cloud busy" if status == 429 else f"cloud answered {status}"
    return RemoteError(reason, detail, http_status=status, retry_after=retry_after)


def request_path(request: GenerationRequest) -> str:
    """Return the path of a request below ``/v1``."""
    return "/completions" if request.messages is None else "/chat/completions"


def request_body(request: GenerationRequest, model: str, predicts: bool = True) -> dict[str, Any]:
    """Return the JSON body of a request; defaults of the API are left out, for servers that know fewer fields.

    Args:
        request: the request.
        model: the endpoint's name of the model.
        predicts: whether the endpoint supports predicted outputs.
    """
    chat, prompt = request.messages is not None, request.prompt
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        body["messages"] = list(request.messages or ())
    else:
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt or ())
    body |= {name: value for name, value in vars(request.sampling).items() if value != _DEFAULTS[name]}
    if request.sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.sampling.logit_bias.items()}
    body |= request.forwarded
    optional = {
        "fields": dict(request.fields),
        "tools": list(request.tools),
        "min_tokens": request.min_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "chat_template_kwargs": dict(request.chat_template_kwargs),
        "stop": list(request.stop),
        "ignore_eos": request.ignore_eos,
    }
    body |= {name: value for name, value in optional.items() if value}
    if request.max_tokens is not None and not request.clamp_max_tokens and "max_completion_tokens" not in body:
        body["max_tokens"] = request.max_tokens
    if request.schema is not None and not body.keys() & {"response_format", "tools"}:
        named = {"name": "answer", "schema": dict(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if not request.speculate:
        body["speculate"] = False
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs} if chat else {"logprobs": request.top_logprobs}
    if predicts and isinstance(request.prediction, str) and request.prediction:
        body["prediction"] = {"type": "content", "content": request.prediction}
    return body


class _Payload(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Token(_Payload):
    token: str
    logprob: float
    top_logprobs: "list[_Token] | None" = None


class _Logprobs(_Payload):
    content: list[_Token] | None = None  # of the chat API; the completions API has the three lists below
    tokens: list[str] | None = None
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Function(_Payload):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(_Payload):
    index: Count = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(_Payload):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(_Payload):
    delta: _Delta | None = None  # of the chat API
    text: str | None = None  # of the completions API
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _UsageDetails(_Payload):
    accepted_prediction_tokens: Count | None = None
    rejected_prediction_tokens: Count | None = None


class _Usage(_Payload):
    prompt_tokens: Count
    completion_tokens: Count | None = None
    completion_tokens_details: _UsageDetails | None = None


class _Chunk(_Payload):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Model(_Payload):
    id: str


class _ModelList(_Payload):
    data: list[_Model] = Field(min_length=1)


async def output_chunks(events: AsyncIterator[str], logprobs: bool) -> AsyncIterator[OutputChunk]:
    """Convert the events of a stream to output chunks, empty ones left out; the last has finish reason and usage.

    Args:
        events: the data of each event.
        logprobs: whether tokens were asked for.

    Raises:
        RemoteError: if they are not in OpenAI's format, report an error, or end before the answer does.
    """
    reason, usage, count = None, None, 0
    last: list[OutputChunk] = []
    async for data in events:
        chunk = _parse_chunk(data)
        usage = _to_usage(chunk.usage) if chunk.usage else usage
        for choice in chunk.choices or ():
            new = _to_output(choice, logprobs)
            reason = reason or choice.finish_reason
            count += bool(new.text or new.tool_calls)
            if reason:  # content that comes with the end goes out with it
                last.append(new)
            elif new.text or new.tokens or new.tool_calls:
                yield new
    if not reason:
        raise RemoteError(BROKE_OFF, "its answer has no end")
    yield OutputChunk(
        "".join(part.text for part in last),
        tuple(token for part in last for token in part.tokens),
        reason if reason in ("length", "tool_calls") else "stop",  # type: ignore[arg-type]
        usage or Usage(0, count),
        tuple(call for part in last for call in part.tool_calls),
    )


def model_names(body: bytes) -> list[str]:
    """Return the names in a response of ``/v1/models``; raises RemoteError if there are none."""
    try:
        return [model.id for model in _ModelList.model_validate_json(body).data]
    except ValidationError:
        raise RemoteError(GARBAGE, "it lists no models; name one with --cloud-model") from None


def error_message(body: bytes) -> str:
    """Return the message of an error response, on one line of at most 200 characters; "" if it is no JSON."""
    try:
        return _message(from_json(body))
    except ValueError:
        return ""


def _parse_chunk(data: str) -> _Chunk:
    try:
        chunk = _Chunk.model_validate_json(data)
    except ValidationError:
        raise RemoteError(GARBAGE, f"not a chunk in OpenAI's format: {data[:40]!r}") from None
    if chunk.error:
        raise _stream_error(chunk.error)
    if chunk.choices is None:
        raise RemoteError(GARBAGE, "a chunk without choices")
    return chunk


def _stream_error(error: Any) -> RemoteError:
    """Return the error of an event; vLLM refuses some requests there, after status 200, with the status as ``code``."""
    status = error.get("code") if isinstance(error, dict) else None
    if isinstance(status, int) and 400 <= status < 600:
        return refusal(status, _message(error))
    return RemoteError("cloud failed", _message(error))


def _to_output(choice: _Choice, logprobs: bool) -> OutputChunk:
    delta = choice.delta or _Delta(content=choice.text)
    calls = []
    for call in delta.tool_calls or ():
        function = call.function or _Function()
        calls.append(ToolCall(call.index, function.arguments or "", call.id, function.name))
    return OutputChunk(delta.content or "", _to_tokens(choice.logprobs) if logprobs else (), tool_calls=tuple(calls))


def _to_tokens(logprobs: _Logprobs | None) -> tuple[GeneratedToken, ...]:
    if logprobs is None:
        return ()
    if logprobs.tokens is None:
        return tuple(
            GeneratedToken(
                UNKNOWN,
                token.token,
                token.logprob,
                tuple((UNKNOWN, other.token, other.logprob) for other in token.top_logprobs or ()),
            )
            for token in logprobs.content or ()
        )
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    try:
        return tuple(
            GeneratedToken(UNKNOWN, text, logprob, tuple((UNKNOWN, *other) for other in (top or {}).items()))
            for text, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True)
        )
    except ValueError:
        raise RemoteError(GARBAGE, "tokens and log-probabilities of different numbers") from None


def _to_usage(usage: _Usage) -> Usage:
    details = usage.completion_tokens_details or _UsageDetails()
    accepted, rejected = details.accepted_prediction_tokens or 0, details.rejected_prediction_tokens or 0
    return Usage(usage.prompt_tokens, usage.completion_tokens or 0, accepted, rejected)


def _message(error: Any) -> str:
    for key in ("error", "message"):
        if isinstance(error, dict):
            error = error.get(key, error)
    return " ".join(str(error)[:2000].split())[:200]
