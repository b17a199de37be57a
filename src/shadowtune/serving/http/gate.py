"""What every request passes first: its host, its key, the kind and size of its body, and whether the server lets in."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shadowtune.config.serving import ServerConfig, hash_key, is_loopback
from shadowtune.serving.http.desk import Desk
from shadowtune.serving.http.faults import error_response
from shadowtune.serving.requests import RequestError

LOGGER = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health")
"""What needs no key: the page, which asks for one, and whether the server is there."""
ADMIN = {("POST", "/v1/load_adapter"), ("POST", "/v1/unload_adapter"), ("PUT", "/v1/policy")}
"""What changes the server: needs an admin key."""
OWNER = "shadowtune.owner"
"""Key of the ASGI scope under which the handlers find who asks."""


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
        scope = _plain(scope)
        send = self._watched(scope, send)
        try:
            self._check(scope)
            body = await self._body(receive, Headers(scope=scope))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        scope[OWNER] = owner_of(scope, self._desk.config)
        await self._app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers, config = Headers(scope=scope), self._desk.config
        check_host(headers, config, str((scope.get("server") or ("",))[0]))
        self._check_key(scope, headers.get("authorization", ""))
        if self._desk.draining:
            raise RequestError("the server is shutting down", 503)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT") and kind != "application/json":
            raise RequestError("send the body as JSON, with the header Content-Type: application/json", 415)

    def _check_key(self, scope: Scope, authorization: str) -> None:
        config, place = self._desk.config, (scope["method"], scope["path"])
        keys = (*config.key_hashes, *config.admin_hashes) if config.key_hashes else ()
        if scope["method"] != "OPTIONS" and scope["path"] not in OPEN_PATHS and not knows_key(authorization, keys):
            raise RequestError("no or a wrong API key; send the header Authorization: Bearer KEY", 401)
        if place not in ADMIN:
            return
        if config.admin_hashes and not knows_key(authorization, config.admin_hashes):
            raise RequestError("this changes the server, and needs an admin key", 403 if keys else 401)
        if not config.admin_hashes and keys and place[0] == "POST":
            raise RequestError("this changes the server, which was started without an admin key", 403)

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """Read the body, as far as it may be read."""
        limit, patience = self._desk.config.max_body_bytes, self._desk.config.read_timeout
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise RequestError(f"a body of {length[:20]} bytes; this server takes at most {limit}", 413)
        try:
            return await asyncio.wait_for(_read(receive, limit), patience)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {patience:g} s", 408) from None

    def _watched(self, scope: Scope, send: Send) -> Send:
        """Count responses of the API, log refusals, and leave out the body where only the head was asked for."""
        headless = scope.get("shadowtune.head", False)

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["path"].startswith("/v1/"):
                    side = Headers(raw=message["headers"]).get("x-shadowtune-side", "")
                    self._desk.metrics.responded(status, side)
                if status >= 400:
                    client = (scope.get("client") or ("?",))[0]
                    LOGGER.info(
                        "refused %s %s of %s, status %d", scope["method"], _quoted(scope["path"]), client, status
                    )
            elif headless:
                message = {**message, "body": b""}
            await send(message)

        return watching


def check_host(headers: Headers, config: ServerConfig, address: str) -> None:
    """Refuse a request that was addressed to another name than the server's, or that another site's page sends.

    Args:
        headers: of the request.
        config: says which names are allowed.
        address: that the server itself listens at.

    Raises:
        RequestError: with status 403.
    """
    if not (config.is_local or config.allowed_hosts):
        return
    host = _name(headers.get("host", ""))
    if host and not _is_allowed(host, config, address):
        raise RequestError(f"the host {_quoted(host)} is not this server's; --allowed-host allows it", 403)
    origin = headers.get("origin")
    if origin is None or "*" in config.allowed_origins or origin in config.allowed_origins:
        return
    if not _is_allowed(_origin_host(origin), config, address):
        raise RequestError(f"pages of {_quoted(origin)} may not call this server; --cors-origin allows them", 403)


def owner_of(scope: Scope, config: ServerConfig) -> str:
    """Return who asks: a digest of the key, or the client's address."""
    authorization = Headers(scope=scope).get("authorization", "")
    if config.key_hashes:
        return hashlib.sha256(authorization.encode()).hexdigest()[:16]
    return str((scope.get("client") or ("unknown",))[0])


def knows_key(authorization: str, key_hashes: Iterable[str]) -> bool:
    """Whether a header names one of the keys, or there are none; takes as long whichever it is, or none."""
    hashes = tuple(key_hashes)
    scheme, _, key = authorization.partition(" ")
    sent = hash_key(key.strip())
    known = not hashes
    for one in hashes:
        known |= hmac.compare_digest(sent, one)
    return known and (not hashes or scheme.lower() == "bearer")


def _origin_host(origin: str) -> str:
    """The host of an origin; no host's name for one that is none, such as "null"."""
    try:
        return _name(urlsplit(origin).netloc)
    except ValueError:
        return ""


def _is_allowed(host: str, config: ServerConfig, address: str) -> bool:
    if "*" in config.allowed_hosts or (config.is_local and is_loopback(host)):
        return True
    return host in {_name(allowed) for allowed in (*config.allowed_hosts, config.host, address)}


def _name(host: str) -> str:
    """A host without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[")
    return (host.rpartition(":")[0] if host.count(":") == 1 else host).rstrip(".")


def _plain(scope: Scope) -> Scope:
    """The scope without a slash at the path's end, and with HEAD as GET whose body is left out."""
    told = dict(scope)
    path = scope["path"].rstrip("/") or "/"
    if path != scope["path"]:
        told |= {"path": path, "raw_path": path.encode()}
    if scope["method"] == "HEAD":
        told |= {"method": "GET", "shadowtune.head": True}
    return told


def _quoted(text: str) -> str:
    """Text of a client as a line of a log or message may have it."""
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
