"""The FastAPI application: middleware, exception handlers, endpoints and the page in front of a backend."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http import errors
from shadowtune.serving.http.admission import AdmissionController, Counters
from shadowtune.serving.http.handlers import AdapterControl, PolicyControl, Role, ServerState, router
from shadowtune.serving.http.middleware import AccessMiddleware
from shadowtune.serving.requests import Backend

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": errors.ErrorResponse, "description": "The request is refused; the message says why."},
    "5XX": {"model": errors.ErrorResponse, "description": "Not now, not in time, or the server's own fault."},
}
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
"""The page may run its own scripts and connect to its own server, nothing else."""


def create_app(
    backend: Backend,
    config: ServerConfig,
    role: Role,
    policy: PolicyControl | None = None,
    adapters: AdapterControl | None = None,
    counters: Counters = dict,
) -> FastAPI:
    """Create the app; the end of its lifespan closes the backend.

    Args:
        backend: generates the outputs.
        config: limits and keys.
        role: which side this server is.
        policy: controlled by ``/v1/policy``; None responds 404 there.
        adapters: controlled by ``/v1/load_adapter`` and ``/v1/unload_adapter``; None responds 404 there.
        counters: numbers of the backend, for ``/metrics``.

    Returns:
        An ASGI app; its ``state.admission`` is the ``AdmissionController``.
    """
    admission = AdmissionController(backend, config, counters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.aclose()

    app = FastAPI(
        title="shadowtune",
        description="OpenAI's API in front of a base with shadows, or of a shadow alone.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect names the host that the client sent
        docs_url=None,  # it loads scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.admission = admission
    app.state.server = ServerState(admission, role, policy, adapters if config.allow_loading else None)
    app.add_middleware(AccessMiddleware, admission=admission)
    if config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, **CORS)
    handlers: dict[Any, Any] = {
        HTTPException: errors.on_http_error,
        RequestValidationError: errors.on_invalid,
        ShadowtuneError: errors.on_shadowtune_error,
        Exception: errors.on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    page = resources.files("shadowtune.serving").joinpath("page/index.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    app.include_router(router)
    _add_options(app, [*app.routes, *router.routes])
    return app


def _add_options(app: FastAPI, routes: list[Any]) -> None:
    """Respond to OPTIONS of every path with its methods; preflight requests of pages go to the CORS middleware."""
    methods: dict[str, set[str]] = {}
    for route in routes:
        if isinstance(route, APIRoute):
            methods.setdefault(route.path, {"OPTIONS"}).update(route.methods or ())
    for path, known in methods.items():
        allowed = ", ".join(sorted(known | ({"HEAD"} if "GET" in known else set())))
        app.add_route(path, _options({"allow": allowed}), methods=["OPTIONS"], include_in_schema=False)


def _options(headers: dict[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def options(request: Request) -> Response:
        return Response(status_code=204, headers=headers)

    return options
