"""The app: OpenAI's paths and ours in front of anything that answers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http import faults, replies
from shadowtune.serving.http.answering import respond
from shadowtune.serving.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    PolicyBody,
    TokenizeBody,
    UnloadBody,
)
from shadowtune.serving.http.control import AdapterControl, Counters, PolicyControl, adapter_path
from shadowtune.serving.http.desk import Desk
from shadowtune.serving.http.dialects import CHAT, COMPLETION, Writing
from shadowtune.serving.http.gate import OWNER, Gate
from shadowtune.serving.http.parsing import StrictJsonRoute
from shadowtune.serving.http.translation import chat_requests, completion_requests, tokenize_request
from shadowtune.serving.requests import Answerer, HasTokens, RequestError
from shadowtune.serving.requests import Request as AnswerRequest

Role = Literal["cloud", "edge"]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": faults.ErrorReply, "description": "The request is refused; the message says why."},
    "5XX": {"model": faults.ErrorReply, "description": "Not now, not in time, or the server's own fault."},
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
"""Each event's data is a chunk as JSON, an error, or [DONE]."""
CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST", "PUT"),
    "allow_headers": ("authorization", "content-type"),
    "expose_headers": tuple(f"x-shadowtune-{name}" for name in ("side", "reason", "confidence", "cost")),
}
"""What pages of allowed origins may send and read."""
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
"""The page may run what is in it and talk to its own server, nothing else."""


def create_app(
    answerer: Answerer,
    config: ServerConfig,
    role: Role,
    policy: PolicyControl | None = None,
    adapters: AdapterControl | None = None,
    counters: Counters = dict,
) -> FastAPI:
    """Make the app; its lifespan's end closes the answerer.

    Args:
        answerer: who answers.
        config: limits and keys.
        role: which side this server is.
        policy: what ``/v1/policy`` shows and changes; None answers 404 there.
        adapters: what ``/v1/load_adapter`` and ``/v1/unload_adapter`` turn; None answers 404 there.
        counters: numbers of whoever answers, for ``/metrics``.

    Returns:
        An ASGI app; its ``state.desk`` is the ``Desk``, for who ends the server.
    """
    desk = Desk(answerer, config, counters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await answerer.aclose()

    app = FastAPI(
        title="shadowtune",
        description="OpenAI's API in front of a base with shadows, or of a shadow alone.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect names the host that the client sent
        docs_url=None,  # it loads scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.router.route_class = StrictJsonRoute
    app.state.desk = desk
    app.add_middleware(Gate, desk=desk)
    if config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, **CORS)
    handlers: dict[Any, Any] = {
        HTTPException: faults.on_http_error,
        RequestValidationError: faults.on_invalid,
        ShadowtuneError: faults.on_shadowtune_error,
        Exception: faults.on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    _add_answers(app, desk)
    _add_facts(app, desk, role)
    _add_policy(app, policy)
    _add_adapters(app, desk, adapters if config.allow_loading else None)
    _add_tokens(app, desk)
    _add_options(app)
    return app


def _add_answers(app: FastAPI, desk: Desk) -> None:
    """Chat and completions."""
    limit = desk.config.max_tokens

    @app.post("/v1/chat/completions", responses={200: {"model": replies.ChatReply, "content": STREAM}})
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        writing = Writing(
            CHAT,
            body.model,
            body.wants_usage,
            body.wants_running_usage,
            tools=() if body.tool_choice == "none" else tuple(tool["function"]["name"] for tool in body.tools or ()),
            single_call=body.parallel_tool_calls is False,
        )
        requests = chat_requests(body, limit, request.scope[OWNER])
        return await respond(desk, requests, body.n or 1, writing, bool(body.stream), request.receive)

    @app.post("/v1/completions", responses={200: {"model": replies.CompletionReply, "content": STREAM}})
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Continue a text, several texts, or token ids."""
        requests = completion_requests(body, limit, request.scope[OWNER], desk.config.max_requests)
        echo = tuple([await _prompt_text(desk, each) for each in requests]) if body.echo else ()
        writing = Writing(COMPLETION, body.model, body.wants_usage, body.wants_running_usage, echo=echo)
        return await respond(desk, requests, body.n or 1, writing, bool(body.stream), request.receive)


def _add_facts(app: FastAPI, desk: Desk, role: Role) -> None:
    """What there is, how it goes, and the page."""
    page = resources.files("shadowtune.serving").joinpath("page/index.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> replies.HealthReply:
        """Say that the server is there and can answer; needs no key."""
        if (failure := desk.failure()) is not None:
            raise RequestError(f"the model's thread has ended: {failure}", 503)
        return replies.HealthReply(role=role)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Tell Prometheus how it goes."""
        return Response(desk.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model_exclude_none=True)
    async def models() -> replies.ModelsReply:
        """List what ``model`` may name."""
        return replies.ModelsReply(data=[replies.ModelReply.of(card) for card in desk.answerer.models()])

    @app.get("/v1/models/{name:path}", response_model_exclude_none=True)
    async def model(name: str) -> replies.ModelReply:
        """Describe a model."""
        for card in desk.answerer.models():
            if card.name == name:
                return replies.ModelReply.of(card)
        raise RequestError(f"there is no model {name!r}; GET /v1/models lists them", 404, "model")

    @app.get("/v1/recent")
    async def recent() -> replies.RecentReply:
        """List the last requests, without what was said."""
        return replies.RecentReply(requests=list(desk.metrics.recent))


def _add_policy(app: FastAPI, policy: PolicyControl | None) -> None:
    """Who answers."""

    def known() -> PolicyControl:
        if policy is None:
            raise RequestError("this server has no policy; one of shadowtune serve edge has", 404)
        return policy

    @app.get("/v1/policy")
    async def shown() -> replies.PolicyReply:
        """Show the policy and what it was measured to give."""
        return replies.PolicyReply(**known().describe())

    @app.put("/v1/policy")
    async def changed(body: PolicyBody) -> replies.PolicyReply:
        """Decide by another threshold from now on."""
        known().set_threshold(float(body.threshold))
        return replies.PolicyReply(**known().describe())


def _add_tokens(app: FastAPI, desk: Desk) -> None:
    """Texts to tokens and back, as vLLM's server has it."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> replies.TokenizeReply:
        """Show the tokens of a text, or of a conversation's prompt."""
        tokens = await _tokens_of(desk).tokenize(tokenize_request(body))
        longest = next((card.max_model_len for card in desk.answerer.models() if card.name == body.model), 0)
        return replies.TokenizeReply(tokens=tokens, count=len(tokens), max_model_len=longest)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> replies.DetokenizeReply:
        """Show the text of tokens."""
        return replies.DetokenizeReply(prompt=await _tokens_of(desk).detokenize(body.model, body.tokens))


def _tokens_of(desk: Desk) -> HasTokens:
    if not isinstance(desk.answerer, HasTokens):
        raise RequestError("this server has no tokenizer", 404)
    return desk.answerer


async def _prompt_text(desk: Desk, request: AnswerRequest) -> str:
    """The prompt of a completion as text."""
    if isinstance(request.prompt, str):
        return request.prompt
    return await _tokens_of(desk).detokenize(request.model, list(request.prompt or ()))


def _add_options(app: FastAPI) -> None:
    """Answer OPTIONS of every path with its methods; preflights of pages go to the CORS middleware."""
    methods: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, APIRoute):
            methods.setdefault(route.path, {"OPTIONS"}).update(route.methods or ())
    for path, known in methods.items():
        allowed = ", ".join(sorted(known | ({"HEAD"} if "GET" in known else set())))
        headers = {"allow": allowed}
        app.add_route(path, _answering(headers), methods=["OPTIONS"], include_in_schema=False)


def _answering(headers: dict[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def options(request: Request) -> Response:
        return Response(status_code=204, headers=headers)

    return options


def _add_adapters(app: FastAPI, desk: Desk, adapters: AdapterControl | None) -> None:
    """Adapters that come and go; those of the start stay."""
    lasting = {card.name for card in desk.answerer.models()}

    def known() -> AdapterControl:
        if adapters is None:
            raise RequestError("this server loads no adapters; start it with --allow-loading", 404)
        return adapters

    @app.post("/v1/load_adapter")
    async def load(body: LoadBody) -> replies.AdapterReply:
        """Load an adapter from a directory of the server."""
        control = known()
        await control.load(body.name, adapter_path(desk.config.adapter_root, body.path))
        return replies.AdapterReply(name=body.name, status="loaded")

    @app.post("/v1/unload_adapter")
    async def unload(body: UnloadBody) -> replies.AdapterReply:
        """Forget an adapter, once what it began has ended."""
        control = known()
        if body.name in lasting:
            raise RequestError(f"{body.name!r} was there when the server started, and stays", 403, "name")
        await control.unload(body.name)
        return replies.AdapterReply(name=body.name, status="unloaded")
