"""Serving an app on a socket: limits for slow and idle connections, and a graceful shutdown."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.http.admission import AdmissionController

SHUTDOWN_SECONDS = 5
"""How long connections may take to close after the last response."""
BACKLOG = 128
SPARE_FILES = 64
"""Open files that are kept for models and logs, beside those of connections."""
LOG_SECONDS = 60.0
"""Between two log lines about connections that cannot be accepted."""
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LOGGER = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket bound to the configured address.

    Raises:
        ConfigError: if the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {config.port} of {config.host} is in use; choose another with --port") from None
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the URL of a server on the socket."""
    host, port = bound.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def make_server(app: FastAPI, config: ServerConfig, ready: Callable[[], None]) -> "Server":
    """Return the server of an app: ``run([bind(config)])`` serves until SIGTERM or SIGINT.

    Args:
        app: of ``create_app``.
        config: its settings.
        ready: called once requests are accepted.
    """
    guard = ConnectionGuard(_connection_limit(config.max_connections), config.read_timeout)
    make_protocol: Any = guard.make_protocol
    settings = uvicorn.Config(
        app,
        http=make_protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(config.idle_timeout)),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return Server(settings, app.state.admission, guard, config.drain_timeout, ready)


class Server(uvicorn.Server):
    """A uvicorn server that responds 503 while running requests finish, and then exits with code 0.

    Args:
        config: of uvicorn.
        admission: of the app.
        guard: of its connections.
        drain_timeout: seconds for running requests.
        ready: called once requests are accepted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        admission: AdmissionController,
        guard: "ConnectionGuard",
        drain_timeout: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._admission, self._guard = admission, guard
        self._drain_timeout, self._ready = drain_timeout, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call ``ready``."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(AcceptErrorHandler(loop.time))
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Check the connections, and shut down once the backend has failed."""
        self._guard.check(self.server_state.connections)
        if not self.should_exit and (failure := self._admission.failure()) is not None:
            LOGGER.critical("the server ends: %s", failure)
            self.drain()
        return await super().on_tick(counter)

    def drain(self) -> None:
        """Refuse new requests from now on, and shut down after the running ones."""
        self.should_exit = self._admission.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; exit at once at the second."""
        self.force_exit = self.should_exit
        self.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish running requests while new ones get 503, then close."""
        draining = asyncio.ensure_future(self._admission.drain(self._drain_timeout))
        while not draining.done() and not self.force_exit:
            self._guard.check(self.server_state.connections)
            await asyncio.wait({draining}, timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals within this context; uvicorn's own raises them again at the end, for another exit code."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class ConnectionGuard:
    """Aborts connections that are too slow or too many.

    A connection is too slow if for ``timeout`` seconds no complete request head arrives, or its client reads nothing of
    what was written. Of too many connections, those that have been idle the longest are aborted, or the newest if all
    are being answered. uvicorn's limits do neither: ``timeout_keep_alive`` starts after a first response, and
    ``limit_concurrency`` refuses requests, and keeps idle connections.

    Args:
        limit: most open connections.
        timeout: seconds.
        clock: returns the time in seconds.
    """

    def __init__(self, limit: int, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._timeout, self._clock = limit, timeout, clock
        self._idle: dict[Any, None] = {}
        self._due: dict[Any, tuple[int, float]] = {}
        """Connections that owe something: see ``_due_of``, and since when."""

    def make_protocol(self, **settings: Any) -> H11Protocol:
        """Make the protocol of a new connection, in place of uvicorn's protocol class."""
        asyncio.get_running_loop().call_soon(self.limit, settings["server_state"].connections)
        return H11Protocol(**settings)

    def check(self, connections: Collection[Any]) -> None:
        """Abort slow connections and excess ones; called several times a second."""
        now, due = self._clock(), dict[Any, tuple[int, float]]()
        for connection in list(connections):
            pending = _due_of(connection)
            if pending is None:
                continue
            before, since = self._due.get(connection, (pending, now))
            due[connection] = (pending, since if pending == before else now)
            if now - due[connection][1] >= self._timeout:
                connection.transport.abort()
        self._due = due
        self.limit(connections)

    def limit(self, connections: Collection[Any]) -> None:
        """Abort excess connections."""
        open_ = [connection for connection in connections if not connection.transport.is_closing()]
        idle = dict.fromkeys(connection for connection in open_ if not _is_answering(connection))
        self._idle = {each: None for each in self._idle if each in idle} | idle  # in the order of becoming idle
        if (excess := len(open_) - self._limit) > 0:
            answering = [connection for connection in open_ if connection not in idle]
            for connection in [*self._idle, *reversed(answering)][:excess]:
                connection.transport.abort()


def _is_answering(connection: Any) -> bool:
    """Whether a request of the connection is being answered."""
    return connection.cycle is not None and not connection.cycle.response_complete


def _due_of(connection: Any) -> int | None:
    """Bytes that the client has to read; 0 if it has to send a request head; None if nothing is due."""
    if unread := connection.transport.get_write_buffer_size():
        return int(unread)
    keep_alive = connection.timeout_keep_alive_task is not None
    return None if keep_alive or _is_answering(connection) else 0


def _connection_limit(wanted: int) -> int:
    """The wanted number of connections, or as many as the process may have open files for."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


class AcceptErrorHandler:
    """Error handler of an event loop that logs connections that cannot be accepted only once a minute.

    asyncio calls it again and again while the process has no file descriptor left.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged: float | None = None
        self._suppressed = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log the error, or count it."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in OUT_OF_FILES):
            loop.default_exception_handler(context)
            return
        now = self._clock()
        if self._logged is not None and now < self._logged + LOG_SECONDS:
            self._suppressed += 1
            return
        LOGGER.error("no connection can be accepted: %s (%d times more before)", error.strerror, self._suppressed)
        self._logged, self._suppressed = now, 0
