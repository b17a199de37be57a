"""Checks that precede every handler: host and origin, API key, draining, and the type, size and JSON of the body."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

import pydantic_core
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shadowtune.config.serving import ServerConfig, hash_key, is_loopback
from shadowtune.serving.http.admission import AdmissionController
from shadowtune.serving.http.errors import error_response
from shadowtune.serving.requests import RequestError

LOGGER = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health")
"""Paths without a key: the page, which asks for one, and the health check."""
ADMIN = {("POST", "/v1/load_adapter"), ("POST", "/v1/unload_adapter"), ("PUT", "/v1/policy")}
"""Requests that change the server and need an admin key."""
OWNER = "shadowtune.owner"
"""Key of the ASGI scope with the client: ``GenerationRequest.owner``."""
MAX_BRACKETS = 100_000
"""Most opening brackets of a body, those in texts included."""


class AccessMiddleware:
    """ASGI middleware: refuses requests, reads their body within limits, and counts responses.

    Args:
        app: the application.
        admission: settings, metrics and draining.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionController) -> None:
        self._app, self._admission, self._config = app, admission, admission.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or call the app with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _normalized(scope)
        send = self._observed(scope, send)
        try:
            self._check(scope)
            body = await self._body(receive, Headers(scope=scope))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        scope[OWNER] = _owner(scope, self._config)
        await self._app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        _check_host(headers, self._config, str((scope.get("server") or ("",))[0]))
        self._check_key(scope, headers.get("authorization", ""))
        if self._admission.draining:
            raise RequestError("the server is shutting down", 503)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != "application/json":
            raise RequestError("send the body as JSON, with the header Content-Type: application/json", 415)

    def _check_key(self, scope: Scope, authorization: str) -> None:
        config, operation = self._config, (scope["method"], scope["path"])
        keys = (*config.key_hashes, *config.admin_hashes) if config.key_hashes else ()
        if scope["method"] != "OPTIONS" and scope["path"] not in OPEN_PATHS and not is_authorized(authorization, keys):
            raise RequestError("no or a wrong API key; send the header Authorization: Bearer KEY", 401)
        if operation not in ADMIN:
            return
        if config.admin_hashes and not is_authorized(authorization, config.admin_hashes):
            raise RequestError("this changes the server, and needs an admin key", 403 if keys else 401)
        if not config.admin_hashes and keys and operation[0] == "POST":
            raise RequestError("this changes the server, which was started without an admin key", 403)

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """Read the body, within the limits of size and time."""
        limit, timeout = self._config.max_body_bytes, self._config.read_timeout
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise RequestError(f"a body of {length[:20]} bytes; this server takes at most {limit}", 413)
        try:
            return await asyncio.wait_for(_read(receive, limit), timeout)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {timeout:g} s", 408) from None

    def _observed(self, scope: Scope, send: Send) -> Send:
        """Count responses of the API, log refusals, and drop the body of a response to HEAD."""
        head_only = scope.get("shadowtune.head", False)

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["path"].startswith("/v1/"):
                    side = Headers(raw=message["headers"]).get("x-shadowtune-side", "")
                    self._admission.metrics.responded(status, side)
                if status >= 400:
                    client, path = (scope.get("client") or ("?",))[0], _printable(scope["path"])
                    LOGGER.info("refused %s %s of %s, status %d", scope["method"], path, client, status)
            elif head_only:
                message = {**message, "body": b""}
            await send(message)

        return observe


class StrictJsonRequest(Request):
    """A request whose body is JSON by its definition: UTF-8 without half characters, and no NaN."""

    async def json(self) -> Any:
        """Parse the body.

        Raises:
            HTTPException: with status 400, if it is not JSON, or has more objects and lists than any request needs: a
                million of them keep the garbage collector busy for seconds.
        """
        body = await self.body()
        brackets = body.count(b"[") + body.count(b"{")
        if brackets > MAX_BRACKETS:
            raise HTTPException(400, f"the body has {brackets} opening brackets, of at most {MAX_BRACKETS}")
        try:
            return pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class StrictJsonRoute(APIRoute):
    """A route whose body is parsed by ``StrictJsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler of FastAPI."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return strict


def is_authorized(authorization: str, key_hashes: Iterable[str]) -> bool:
    """Return whether a header has one of the keys, or there are none, in time independent of the result."""
    hashes = tuple(key_hashes)
    scheme, _, key = authorization.partition(" ")
    sent = hash_key(key.strip())
    known = not hashes
    for one in hashes:
        known |= hmac.compare_digest(sent, one)
    return known and (not hashes or scheme.lower() == "bearer")


def _check_host(headers: Headers, config: ServerConfig, address: str) -> None:
    """Raise RequestError 403 for another host name than the server's, or a page of another origin.

    Args:
        headers: of the request.
        config: with the allowed names.
        address: at which the server listens.
    """
    if not (config.is_local or config.allowed_hosts):
        return
    host = _host_name(headers.get("host", ""))
    if host and not _is_allowed(host, config, address):
        raise RequestError(f"the host {_printable(host)} is not this server's; --allowed-host allows it", 403)
    origin = headers.get("origin")
    if origin is None or "*" in config.allowed_origins or origin in config.allowed_origins:
        return
    try:
        origin_host = _host_name(urlsplit(origin).netloc)
    except ValueError:
        origin_host = ""
    if not _is_allowed(origin_host, config, address):
        raise RequestError(f"pages of {_printable(origin)} may not call this server; --cors-origin allows them", 403)


def _is_allowed(host: str, config: ServerConfig, address: str) -> bool:
    if "*" in config.allowed_hosts or (config.is_local and is_loopback(host)):
        return True
    return host in {_host_name(allowed) for allowed in (*config.allowed_hosts, config.host, address)}


def _host_name(host: str) -> str:
    """A host in lower case, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[")
    return (host.rpartition(":")[0] if host.count(":") == 1 else host).rstrip(".")


def _owner(scope: Scope, config: ServerConfig) -> str:
    """A digest of the client's key, or its address."""
    authorization = Headers(scope=scope).get("authorization", "")
    if config.key_hashes:
        return hashlib.sha256(authorization.encode()).hexdigest()[:16]
    return str((scope.get("client") or ("unknown",))[0])


def _normalized(scope: Scope) -> Scope:
    """The scope without a slash at the path's end, and with HEAD as a GET whose body is dropped."""
    result = dict(scope)
    path = scope["path"].rstrip("/") or "/"
    if path != scope["path"]:
        result |= {"path": path, "raw_path": path.encode()}
    if scope["method"] == "HEAD":
        result |= {"method": "GET", "shadowtune.head": True}
    return result


def _printable(text: str) -> str:
    """Text of a client, fit for a line of a log or message."""
    return "".join(letter if " " < letter <= "~" else "?" for letter in text[:100])


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client has gone", 499)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise RequestError(f"a body of more than the {limit} bytes that this server takes", 413)
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that gives the body once, then what comes on the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
