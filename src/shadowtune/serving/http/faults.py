"""What goes wrong, as OpenAI's API says it."""

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shadowtune.config.checking import nearest
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http.bodies import ChatBody, CompletionBody, Message, Prediction, StreamOptions
from shadowtune.serving.requests import RequestError

KINDS: dict[int, tuple[str, str | None]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    408: ("timeout", "request_timeout"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "unavailable"),
    504: ("timeout", "timeout"),
}
"""Type and code of what is not the request's fault alone."""
RETRY_SECONDS = 1
MAX_FAULTS = 64
"""Faults of a body that are looked at."""
MAX_NAME = 64
"""Characters of a field's name that are quoted."""
HEADERS: dict[int, dict[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    413: {"connection": "close"},
    429: {"retry-after": str(RETRY_SECONDS)},
    503: {"retry-after": str(RETRY_SECONDS), "connection": "close"},
}
"""What a client is told to do."""
BODIES = (ChatBody, CompletionBody, StreamOptions, Message, Prediction)
UNSUPPORTED = {
    name
    for body in BODIES
    for name, field in body.model_fields.items()
    if field.description in ("Not supported: leave it out.", "Text alone.")
}

KNOWN = {name for body in BODIES for name in body.model_fields}
"""Names of all fields, for hints."""


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An error as OpenAI's API gives it."""

    error: ErrorDetail


def error_object(error: RequestError) -> dict[str, Any]:
    """Return ``{"error": {...}}``."""
    usual = "server_error" if error.status >= 500 else "invalid_request_error"
    kind, code = KINDS.get(error.status, (usual, None))
    if error.status == 404 and error.param == "model":
        code = "model_not_found"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """Return the response that says so; all of it ASCII, for what was sent may be quoted."""
    content = json.dumps(error_object(error))
    told = {**HEADERS.get(error.status, {}), **(headers or {})}
    return Response(content, error.status, told, media_type="application/json")


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """Answer what the framework refuses: no such path, no such method, a body that it cannot read."""
    message = error.detail if error.status_code == 400 else f"{request.method} {request.url.path}: {error.detail}"
    return error_response(RequestError(message, error.status_code), dict(error.headers or {}))


async def on_invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer a body that is not as documented, naming the fields at fault."""
    told: dict[str, list[str]] = {}
    for fault in error.errors()[:MAX_FAULTS]:
        name = _param(fault, error.body)
        told.setdefault(name, [])
        if (line := _line(name, fault)) not in told[name]:
            told[name].append(line)
    lines = [f"{name}: {' or '.join(found[:3])}" if name else found[0] for name, found in told.items()]
    return error_response(RequestError("; ".join(lines[:5]), param=next(iter(told)) or None))


async def on_shadowtune_error(request: Request, error: ShadowtuneError) -> Response:
    """Answer what cannot be done as it was asked for."""
    return error_response(error if isinstance(error, RequestError) else RequestError(str(error)))


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer that it is our fault."""
    return error_response(RequestError("the server failed; its log has the cause", 500))


def _param(fault: dict[str, Any], body: Any) -> str:
    """The field at fault as OpenAI writes it, ``messages[0].content``.

    Pydantic's places have the names of types between those of fields where a field has alternatives; what is a field or
    an index is found by walking through the body.
    """
    name, here = "", body
    steps = list(fault["loc"][1:])
    for number, step in enumerate(steps):
        missing = fault["type"] == "missing" and number == len(steps) - 1
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            name, here = f"{name}[{step}]", here[step]
        elif isinstance(step, str) and ((isinstance(here, dict) and step in here) or missing):
            plain = " ".join(step[:MAX_NAME].split())
            name = f"{name}.{plain}" if name else plain
            here = here.get(step) if isinstance(here, dict) else None
    return name


def _line(name: str, fault: dict[str, Any]) -> str:
    last = name.rpartition(".")[2]
    if fault["type"] == "extra_forbidden":
        return f"there is no such field{nearest(last, KNOWN)}"
    if name in UNSUPPORTED:
        return "not supported by this server; leave it out"
    return str(fault["msg"]).removeprefix("Value error, ")
