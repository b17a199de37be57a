"""Endpoints of the HTTP API: OpenAI's, tokenization, and control of adapters and routing policy.

A body of chat completions or completions becomes one ``GenerationRequest`` for each prompt and each of its ``n``
choices; ``streaming.respond`` does the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from shadowtune.serving.http import responses
from shadowtune.serving.http.admission import AdmissionController
from shadowtune.serving.http.middleware import OWNER, StrictJsonRoute
from shadowtune.serving.http.protocol import (
    ChatCompletionRequest,
    CommonRequest,
    CompletionRequest,
    DetokenizeRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    LoadAdapterRequest,
    MessageParam,
    NamedToolChoice,
    PolicyRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    text_of,
)
from shadowtune.serving.http.serializers import ChatSerializer, CompletionSerializer
from shadowtune.serving.http.streaming import respond
from shadowtune.serving.requests import (
    GenerationRequest,
    RequestError,
    SamplingParams,
    SupportsTokenization,
)
from shadowtune.serving.tools import call_schema

Role = Literal["cloud", "edge"]
COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` in OpenAI's completions API."""
MIN_TEMPERATURE = 1e-3
"""A temperature below it is greedy: dividing by it would overflow."""
FORWARDED = {"max_completion_tokens", "response_format", "tools", "tool_choice", "parallel_tool_calls"}
"""Fields that a remote endpoint gets unchanged."""
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
"""Content of a stream in the OpenAPI document. Each event's data is a chunk as JSON, an error, or [DONE]."""
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class PolicyControl(Protocol):
    """A routing policy that ``/v1/policy`` shows and changes."""

    def describe(self) -> Mapping[str, Any]:
        """Return ``kind``, ``threshold``, ``signal`` and ``curve``: None, None and an empty list where it has none.

        A point of the curve has threshold, accuracy, deferral_rate and cost.
        """

    def set_threshold(self, threshold: float) -> None:
        """Change the threshold.

        Raises:
            ShadowtuneError: if the policy has none, or it is out of its range.
        """


class AdapterControl(Protocol):
    """Adapters that can be loaded and unloaded."""

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a directory of the server.

        Raises:
            ShadowtuneError: if the name is taken, or the directory holds no adapter of this base.
        """

    async def unload(self, name: str) -> None:
        """Unload an adapter after its running requests.

        Raises:
            RequestError: if there is none of that name.
        """


@dataclass
class ServerState:
    """What the handlers of one app share."""

    admission: AdmissionController
    role: Role
    policy: PolicyControl | None
    adapters: AdapterControl | None
    initial_models: set[str] = field(init=False)
    """Models of the start, which cannot be unloaded."""

    def __post_init__(self) -> None:
        """Read the names of the models."""
        self.initial_models = {card.name for card in self.admission.backend.models()}

    def require_tokenization(self) -> SupportsTokenization:
        """Return the backend, if it exposes its tokenizer; raises RequestError 404."""
        backend = self.admission.backend
        if not isinstance(backend, SupportsTokenization):
            raise RequestError("this server has no tokenizer", 404)
        return backend

    def require_policy(self) -> PolicyControl:
        """Return the routing policy; raises RequestError 404."""
        if self.policy is None:
            raise RequestError("this server has no policy; one of shadowtune serve edge has", 404)
        return self.policy

    def require_adapters(self) -> AdapterControl:
        """Return the control of adapters; raises RequestError 404."""
        if self.adapters is None:
            raise RequestError("this server loads no adapters; start it with --allow-loading", 404)
        return self.adapters


async def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_state)]
router = APIRouter(route_class=StrictJsonRoute)


@router.post("/v1/chat/completions", responses={200: {"model": responses.ChatCompletionResponse, "content": STREAM}})
async def create_chat_completion(body: ChatCompletionRequest, request: Request, state: State) -> Response:
    """Answer a conversation."""
    tools = () if body.tool_choice == "none" else body.tool_names
    single_call = body.parallel_tool_calls is False
    serializer = ChatSerializer(body.model, body.include_usage, body.continuous_usage, tools, single_call)
    requests = chat_requests(body, state.admission.config.max_tokens, request.scope[OWNER])
    return await respond(state.admission, requests, body.n or 1, serializer, bool(body.stream), request.receive)


@router.post("/v1/completions", responses={200: {"model": responses.CompletionResponse, "content": STREAM}})
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue a text, several texts, or token ids."""
    config = state.admission.config
    requests = completion_requests(body, config.max_tokens, request.scope[OWNER], config.max_requests)
    echo = [await _prompt_text(state, each) for each in requests] if body.echo else []
    serializer = CompletionSerializer(body.model, body.include_usage, body.continuous_usage, echo=echo)
    return await respond(state.admission, requests, body.n or 1, serializer, bool(body.stream), request.receive)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> responses.TokenizeResponse:
    """Return the token ids of a text, or of a conversation's prompt."""
    tokens = await state.require_tokenization().tokenize(
        GenerationRequest(
            body.model,
            messages=None if body.messages is None else [_message(turn) for turn in body.messages],
            prompt=body.prompt,
            tools=tuple(dict(tool) for tool in body.tools or ()),
            chat_template_kwargs=dict(body.chat_template_kwargs or {}),
        )
    )
    cards = state.admission.backend.models()
    length = next((card.max_model_len for card in cards if card.name == body.model), 0)
    return responses.TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=length)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> responses.DetokenizeResponse:
    """Return the text of token ids."""
    return responses.DetokenizeResponse(prompt=await state.require_tokenization().detokenize(body.model, body.tokens))


@router.get("/health")
async def health(state: State) -> responses.HealthResponse:
    """Return whether the server can answer; needs no key."""
    if (failure := state.admission.failure()) is not None:
        raise RequestError(f"the model's thread has ended: {failure}", 503)
    return responses.HealthResponse(role=state.role)


@router.get("/metrics", responses=METRICS)
async def metrics(state: State) -> Response:
    """Return Prometheus metrics."""
    exposition = state.admission.metrics.exposition()
    return Response(exposition, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", response_model_exclude_none=True)
async def list_models(state: State) -> responses.ModelList:
    """List the models."""
    return responses.ModelList(data=[responses.ModelResponse.of(card) for card in state.admission.backend.models()])


@router.get("/v1/models/{name:path}", response_model_exclude_none=True)
async def retrieve_model(name: str, state: State) -> responses.ModelResponse:
    """Describe a model."""
    for card in state.admission.backend.models():
        if card.name == name:
            return responses.ModelResponse.of(card)
    raise RequestError(f"there is no model {name!r}; GET /v1/models lists them", 404, "model")


@router.get("/v1/recent")
async def list_recent(state: State) -> responses.RecentResponse:
    """List the last requests, without prompts and outputs."""
    return responses.RecentResponse(requests=list(state.admission.metrics.recent))


@router.get("/v1/policy")
async def retrieve_policy(state: State) -> responses.PolicyResponse:
    """Return the routing policy and its measured curve."""
    return responses.PolicyResponse(**state.require_policy().describe())


@router.put("/v1/policy")
async def update_policy(body: PolicyRequest, state: State) -> responses.PolicyResponse:
    """Change the threshold of the routing policy."""
    policy = state.require_policy()
    policy.set_threshold(float(body.threshold))
    return responses.PolicyResponse(**policy.describe())


@router.post("/v1/load_adapter")
async def load_adapter(body: LoadAdapterRequest, state: State) -> responses.AdapterResponse:
    """Load an adapter from a directory of the server."""
    adapters = state.require_adapters()
    await adapters.load(body.name, _adapter_path(state.admission.config.adapter_root, body.path))
    return responses.AdapterResponse(name=body.name, status="loaded")


@router.post("/v1/unload_adapter")
async def unload_adapter(body: UnloadAdapterRequest, state: State) -> responses.AdapterResponse:
    """Unload an adapter after its running requests."""
    adapters = state.require_adapters()
    if body.name in state.initial_models:
        raise RequestError(f"{body.name!r} was there when the server started, and stays", 403, "name")
    await adapters.unload(body.name)
    return responses.AdapterResponse(name=body.name, status="unloaded")


def chat_requests(body: ChatCompletionRequest, limit: int | None, owner: str = "") -> list[GenerationRequest]:
    """Return a request for each choice.

    Args:
        body: of ``/v1/chat/completions``.
        limit: most tokens that may be asked for; None for any number.
        owner: the client.

    Raises:
        RequestError: if more tokens are asked for.
    """
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    choice: Any = body.tool_choice
    source = {
        "messages": [_message(turn) for turn in body.messages],
        "tools": tuple(dict(tool) for tool in body.tools or ()),
        "tool_choice": choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
        "chat_template_kwargs": dict(body.chat_template_kwargs or {}),
        "fields": dict(body.fields or {}),
        "schema": _chat_schema(body),
        "top_logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    return list(_choices(body, [source], _length(asked, limit, limit), owner))


def completion_requests(
    body: CompletionRequest, limit: int | None, owner: str = "", max_choices: int | None = None
) -> list[GenerationRequest]:
    """Return a request for each choice, the ``n`` of each prompt adjacent.

    Args:
        body: of ``/v1/completions``.
        limit: most tokens that may be asked for; None for any number.
        owner: the client.
        max_choices: most choices that may be asked for; None for any number.

    Raises:
        RequestError: if more tokens or choices are asked for.
    """
    prompt: Any = body.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if single else prompt
    count = len(prompts) * (body.n or 1)
    if max_choices is not None and count > max_choices:
        raise RequestError(f"{count} answers at once are more than this server's {max_choices}; ask for fewer")
    schema = _schema(body)
    sources = [{"prompt": one, "schema": schema, "top_logprobs": body.logprobs} for one in prompts]
    default = COMPLETION_TOKENS if limit is None else min(limit, COMPLETION_TOKENS)
    return list(_choices(body, sources, _length(body.max_tokens, limit, default), owner))


def _choices(
    body: CommonRequest, sources: Sequence[dict[str, Any]], length: dict[str, Any], owner: str
) -> Iterator[GenerationRequest]:
    """Repeat every prompt ``n`` times; with a seed, each choice has its own."""
    sampling = _sampling(body)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sent = body.model_dump(include=FORWARDED, exclude_unset=True, by_alias=True)
    common: dict[str, Any] = {
        "stop": stop,
        "ignore_eos": bool(body.ignore_eos),
        "prediction": None if body.prediction is None else text_of(body.prediction.content),
        "speculate": body.speculate is not False,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "min_tokens": body.min_tokens or 0,
        "owner": owner,
        "forwarded": {name: value for name, value in sent.items() if value is not None and value != []},
        **length,
    }
    for source in sources:
        for choice in range(body.n or 1):
            seed = None if sampling.seed is None else sampling.seed + choice
            yield GenerationRequest(body.model, sampling=replace(sampling, seed=seed), **common, **source)


def _message(turn: MessageParam) -> dict[str, Any]:
    """A message as a remote endpoint or a chat template takes it."""
    message: dict[str, Any] = {"role": turn.role, "content": None if turn.content is None else text_of(turn.content)}
    if turn.tool_calls:
        message["tool_calls"] = [call.model_dump(exclude_none=True) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message


def _chat_schema(body: ChatCompletionRequest) -> Mapping[str, Any] | None:
    """The schema of the output: of a tool call, where one is required, or of the response format."""
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedToolChoice):
        name = body.tool_choice.function.name
        return call_schema(tool for tool in tools if tool["function"]["name"] == name)
    if body.tool_choice == "required":
        return call_schema(tools)
    schema = _schema(body)
    if schema is None or not tools or body.tool_choice == "none":
        return schema
    return {"anyOf": [call_schema(tools), schema]}


def _schema(body: CommonRequest) -> Mapping[str, Any] | None:
    if isinstance(body.response_format, JsonObjectFormat):
        return {"type": "object"}
    return body.response_format.json_schema.schema_ if isinstance(body.response_format, JsonSchemaFormat) else None


def _length(asked: int | None, limit: int | None, default: int | None) -> dict[str, Any]:
    """The fields for the length of the output: as asked for, else at most ``default``."""
    if asked is None:
        return {"max_tokens": default, "clamp_max_tokens": True}
    if limit is not None and asked > limit:
        raise RequestError(f"max_tokens {asked} is more than this server's {limit}; ask for fewer", param="max_tokens")
    return {"max_tokens": asked}


def _sampling(body: CommonRequest) -> SamplingParams:
    def given(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    temperature = given(body.temperature, 1.0)
    return SamplingParams(
        temperature=0.0 if temperature < MIN_TEMPERATURE else temperature,
        top_p=given(body.top_p, 1.0),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        min_p=body.min_p,
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        repetition_penalty=None if body.repetition_penalty is None else float(body.repetition_penalty),
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
    )


async def _prompt_text(state: ServerState, request: GenerationRequest) -> str:
    """The prompt of a completion as text."""
    if isinstance(request.prompt, str):
        return request.prompt
    return await state.require_tokenization().detokenize(request.model, list(request.prompt or ()))


def _adapter_path(root: str | None, path: str) -> str:
    """Return the directory that a client may load an adapter from.

    Args:
        root: directory of the adapters; None allows any path.
        path: as the client names it, below the root or relative to it.

    Raises:
        RequestError: if it leaves the root; the same one whether it exists or not.
    """
    if root is None:
        return path
    refusal = RequestError("path must name an adapter in the server's adapter directory", 400, "path")
    try:
        base = Path(root).resolve()
        found = (base / path).resolve()
        inside = found != base and found.is_relative_to(base) and found.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, a loop of links
        raise refusal from None
    if not inside:
        raise refusal
    return str(found)
