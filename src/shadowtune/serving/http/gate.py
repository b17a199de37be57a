"""What every request passes first: keys, the kind and size of its body, and whether the server still lets in."""

import asyncio
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shadowtune.config.serving import hash_key
from shadowtune.serving.http.desk import Desk
from shadowtune.serving.http.faults import error_response
from shadowtune.serving.requests import RequestError

OPEN_PATHS = ("/", "/health")
"""What needs no key: the page, which asks for one, and whether the server is there."""


class Gate:
    """ASGI middleware.

    Args:
        app: what it guards.
        desk: the app's limits and metrics.
    """

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app, self._desk = app, desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or hand it on with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("/v1/"):
            send = self._counted(send)
        try:
            self._check(scope)
            body = await self._body(receive, Headers(scope=scope))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers, config = Headers(scope=scope), self._desk.config
        if scope["path"] not in OPEN_PATHS and not knows_key(headers.get("authorization", ""), config.key_hashes):
            raise RequestError("no or a wrong API key; send the header Authorization: Bearer KEY", 401)
        if self._desk.draining:
            raise RequestError("the server is shutting down", 503)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != "application/json":
            raise RequestError("send the body as JSON, with the header Content-Type: application/json", 415)

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """Read the body, as far as it may be read."""
        limit, patience = self._desk.config.max_body_bytes, self._desk.config.read_timeout
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise RequestError(f"a body of {length} bytes; this server takes at most {limit}", 413)
        try:
            return await asyncio.wait_for(_read(receive, limit), patience)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {patience:g} s", 408) from None

    def _counted(self, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                side = Headers(raw=message["headers"]).get("x-shadowtune-side", "")
                self._desk.metrics.responded(message["status"], side)
            await send(message)

        return counting


def knows_key(authorization: str, key_hashes: Iterable[str]) -> bool:
    """Whether a header names one of the keys, or there are none; takes as long whichever it is, or none."""
    hashes = tuple(key_hashes)
    scheme, _, key = authorization.partition(" ")
    sent = hash_key(key.strip())
    known = not hashes
    for one in hashes:
        known |= hmac.compare_digest(sent, one)
    return known and (not hashes or scheme.lower() == "bearer")


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


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what comes on the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
