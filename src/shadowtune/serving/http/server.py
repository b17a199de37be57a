"""An app behind a socket: who connects has to ask, and the end comes after what was begun."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.http.desk import Desk

ENDING_SECONDS = 5
"""For which connections may close after the last answer."""
BACKLOG = 128
SPARE_FILES = 64
"""Open files that are kept for models and logs, beside those of connections."""
LOG_SECONDS = 60.0
"""Between two lines about connections that cannot be accepted."""
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LOGGER = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket bound to the address.

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
    """Return the URL of a server behind the socket."""
    host, port = bound.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def make_server(app: FastAPI, config: ServerConfig, ready: Callable[[], None]) -> "Server":
    """Return what serves an app: ``run([bind(config)])`` does until SIGTERM or SIGINT, and finishes what was begun.

    Args:
        app: of ``create_app``.
        config: its settings.
        ready: called once requests are taken.
    """
    settings = uvicorn.Config(
        app,
        http=_patient(config.read_timeout, Connections(_most_connections(config.max_connections))),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(config.idle_timeout)),
        timeout_graceful_shutdown=ENDING_SECONDS,
    )
    return Server(settings, app.state.desk, config.drain_timeout, ready)


class Server(uvicorn.Server):
    """A uvicorn that answers with 503 while it finishes what it began, and then ends without an error.

    Args:
        config: of uvicorn.
        desk: of the app.
        drain_timeout: seconds for what was begun.
        ready: called once requests are taken.
    """

    def __init__(self, config: uvicorn.Config, desk: Desk, drain_timeout: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._desk, self._drain_timeout, self._ready = desk, drain_timeout, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(QuietAccept(loop.time))
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Begin the end where whoever answers never can again."""
        if not self.should_exit and (failure := self._desk.failure()) is not None:
            LOGGER.critical("the server ends: %s", failure)
            self.should_exit = self._desk.draining = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end at the first signal; at the second, end."""
        self.force_exit = self.should_exit
        self.should_exit = self._desk.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was begun while new requests are told to go elsewhere, then close."""
        draining = asyncio.ensure_future(self._desk.drain(self._drain_timeout))
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals meanwhile; uvicorn's own would raise them again at the end, which is no end without error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class QuietAccept:
    """Handler of an event loop's errors: connections that cannot be accepted are told of once in a while.

    asyncio calls it again and again while the process has no file descriptor left.

    Args:
        clock: tells the seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: float | None = None
        self._untold = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log the error, or count it."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in OUT_OF_FILES):
            loop.default_exception_handler(context)
            return
        now = self._clock()
        if self._told is not None and now < self._told + LOG_SECONDS:
            self._untold += 1
            return
        LOGGER.error("no connection can be accepted: %s (%d times more before)", error.strerror, self._untold)
        self._told, self._untold = now, 0


class Connections:
    """Open connections of a server, of which there is a largest number.

    Args:
        most: connections; one more closes the one that has been without a request for the longest, or itself if all
            are answered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[Any, None] = {}
        self._answered: set[Any] = set()

    def __len__(self) -> int:
        """Connections that are open."""
        return len(self._waiting) + len(self._answered)

    def open(self, transport: Any) -> None:
        """Count a new connection."""
        self._waiting[transport] = None
        if len(self) > self._most:
            oldest = next(iter(self._waiting))
            self.close(oldest)
            oldest.abort()

    def wait(self, transport: Any) -> None:
        """A connection waits for its next request."""
        if transport in self._answered:
            self._answered.discard(transport)
            self._waiting[transport] = None

    def answer(self, transport: Any) -> None:
        """A connection's request is being answered."""
        if transport in self._waiting:
            del self._waiting[transport]
            self._answered.add(transport)

    def close(self, transport: Any) -> None:
        """A connection is gone."""
        self._waiting.pop(transport, None)
        self._answered.discard(transport)


def _most_connections(wanted: int) -> int:
    """The wanted number, or as many as the process may have open files for."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


def _patient(seconds: float, connections: Connections) -> type[H11Protocol]:
    """Return uvicorn's protocol with an end to waiting.

    A connection is dropped if so many seconds go by without a whole head of a request, or without its client taking
    anything of what was written.
    """

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections.open(transport)
            self._head = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answering = self.cycle is not None and not self.cycle.response_complete
            (connections.answer if answering else connections.wait)(self.transport)
            if answering:
                self._stop_head()
            elif self._head is None:
                self._head = self.loop.call_later(seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taking = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_taking()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head()
            self._stop_taking()
            connections.close(self.transport)
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            connections.wait(self.transport)

        def _stop_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _stop_taking(self) -> None:
            if self._taking is not None:
                self._taking.cancel()
                self._taking = None

    return Patient
