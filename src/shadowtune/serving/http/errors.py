"""Errors as OpenAI's API reports them: exception handlers, and messages that name the invalid fields of a body."""

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shadowtune.config.settings import nearest
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http.protocol import (
    NOT_SUPPORTED,
    TEXT_ONLY,
    ChatCompletionRequest,
    CompletionRequest,
    MessageParam,
    PredictionParam,
    StreamOptions,
)
from shadowtune.serving.requests import RequestError

TYPES: dict[int, tuple[str, str | None]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    408: ("timeout", "request_timeout"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "unavailable"),
    504: ("timeout", "timeout"),
}
"""Error type and code of a status."""
RETRY_SECONDS = 1
MAX_ERRORS = 64
"""Most validation errors of a body that are read."""
MAX_NAME = 64
"""Most characters of a field's name that are quoted."""
HEADERS: dict[int, dict[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    413: {"connection": "close"},
    429: {"retry-after": str(RETRY_SECONDS)},
    503: {"retry-after": str(RETRY_SECONDS), "connection": "close"},
}
"""Response headers of a status."""
MODELS = (ChatCompletionRequest, CompletionRequest, StreamOptions, MessageParam, PredictionParam)
FIELDS = {name: field.description for model in reversed(MODELS) for name, field in model.model_fields.items()}
"""Descriptions of all fields, by name."""


class ErrorDetail(BaseModel):
    """Message, type, invalid field and code of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorDetail


def error_object(error: RequestError) -> dict[str, Any]:
    """Return ``{"error": {...}}``."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    kind, code = TYPES.get(error.status, (default, None))
    if error.status == 404 and error.param == "model":
        code = "model_not_found"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """Return the response of an error, in ASCII, because it may quote anything that a client sent."""
    all_headers = {**HEADERS.get(error.status, {}), **(headers or {})}
    return Response(json.dumps(error_object(error)), error.status, all_headers, media_type="application/json")


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """Respond to errors of the framework: an unknown path, a wrong method, an unreadable body."""
    message = error.detail if error.status_code == 400 else f"{request.method} {request.url.path}: {error.detail}"
    return error_response(RequestError(message, error.status_code), dict(error.headers or {}))


async def on_invalid(request: Request, error: RequestValidationError) -> Response:
    """Respond to an invalid body, naming its invalid fields."""
    lines: dict[str, list[str]] = {}
    for detail in error.errors()[:MAX_ERRORS]:
        name = _param(detail, error.body)
        lines.setdefault(name, [])
        if (line := _message(name, detail)) not in lines[name]:
            lines[name].append(line)
    messages = [f"{name}: {' or '.join(found[:3])}" if name else found[0] for name, found in lines.items()]
    return error_response(RequestError("; ".join(messages[:5]), param=next(iter(lines)) or None))


async def on_shadowtune_error(request: Request, error: ShadowtuneError) -> Response:
    """Respond to a request that cannot be answered."""
    return error_response(error if isinstance(error, RequestError) else RequestError(str(error)))


async def on_bug(request: Request, error: Exception) -> Response:
    """Respond to an unforeseen error, without its message."""
    return error_response(RequestError("the server failed; its log has the cause", 500))


def _param(detail: dict[str, Any], body: Any) -> str:
    """The invalid field in OpenAI's notation, ``messages[0].content``.

    Pydantic's locations have the names of types between those of fields where a field has alternatives; walking through
    the body distinguishes fields and indices from these.
    """
    name, value = "", body
    steps = list(detail["loc"][1:])
    for number, step in enumerate(steps):
        missing = detail["type"] == "missing" and number == len(steps) - 1
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            name, value = f"{name}[{step}]", value[step]
        elif isinstance(step, str) and ((isinstance(value, dict) and step in value) or missing):
            plain = " ".join(step[:MAX_NAME].split())
            name = f"{name}.{plain}" if name else plain
            value = value.get(step) if isinstance(value, dict) else None
    return name


def _message(name: str, detail: dict[str, Any]) -> str:
    last = name.rpartition(".")[2]
    if detail["type"] == "extra_forbidden":
        return f"there is no such field{nearest(last, FIELDS)}"
    if FIELDS.get(name) in (NOT_SUPPORTED, TEXT_ONLY):
        return "not supported by this server; leave it out"
    return str(detail["msg"]).removeprefix("Value error, ")
