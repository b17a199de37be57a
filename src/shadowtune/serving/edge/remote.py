"""Client of a remote (cloud) endpoint with OpenAI's API: time-outs, retries, a circuit breaker, bounded input.

HTTP and server-sent events are httpx2's, which bounds the size of an event; the format of requests and chunks is in
``openai_api``. Nothing that the endpoint sends is trusted: whatever it does ends in a ``RemoteError``.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

import httpx2

from shadowtune.config.serving import CloudConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.openai_api import (
    BROKE_OFF,
    GARBAGE,
    RemoteError,
    error_message,
    model_names,
    output_chunks,
    refusal,
    request_body,
    request_path,
)
from shadowtune.serving.requests import GenerationRequest, ModelCard, OutputChunk, RoutingDecision

DONE = "[DONE]"
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that are worth another attempt."""
ERROR_BYTES = 65536
"""Most bytes read of the body of an error response."""
Result = TypeVar("Result")


class CircuitBreaker:
    """Stop asking an endpoint that keeps failing: open after consecutive failures, then one probe after a pause.

    Args:
        failures: consecutive failures after which it opens.
        cool_down: seconds for which it stays open.
        clock: returns seconds.
    """

    def __init__(self, failures: int, cool_down: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cool_down, self._clock = failures, cool_down, clock
        self._failed = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Closed admits all attempts, open none, half-open one."""
        if self._opened is None:
            return "closed"
        return "open" if self._clock() < self._opened + self._cool_down else "half-open"

    def admit(self) -> None:
        """Begin an attempt; ``succeed``, ``fail`` or ``release`` must follow.

        Raises:
            RemoteError: if no attempt is admitted.
        """
        state = self.state
        if state == "open" or (state == "half-open" and self._probing):
            raise RemoteError("cloud circuit open", f"it failed {self._failed} times in a row", 503)
        self._probing = state == "half-open"

    def succeed(self) -> None:
        """Record an attempt that got a response."""
        self._failed, self._opened, self._probing = 0, None, False

    def fail(self) -> None:
        """Record an attempt that got no response, or one that broke off."""
        self._failed += 1
        if self._probing or self._failed >= self._limit:
            self._opened = self._clock()
        self._probing = False

    def release(self) -> None:
        """Record an attempt that was given up without a result."""
        self._probing = False


class RemoteStream:
    """The generation stream of a remote endpoint, whose first chunk has arrived.

    A task of its own reads the connection, so that the stream can be closed at any moment, even while it is awaited.
    """

    def __init__(self, endpoint: "RemoteEndpoint", first: OutputChunk, rest: AsyncGenerator[OutputChunk, None]) -> None:
        self.decision = RoutingDecision("cloud", "asked")
        self._endpoint, self._rest = endpoint, rest
        self._chunks: asyncio.Queue[OutputChunk | None] = asyncio.Queue()
        self._chunks.put_nowait(first)
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._chunks.put_nowait(None))

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Yield the chunks as they arrive; after ``aclose`` those that arrived before it.

        Raises:
            RemoteError: after the chunks that arrived, if the endpoint breaks off.
        """
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
        if not self._reader.cancelled():
            self._reader.result()

    async def aclose(self) -> None:
        """Close the connection, at which the endpoint stops."""
        self._reader.cancel()
        await asyncio.wait([self._reader])
        if not self._reader.cancelled():
            self._reader.exception()  # mark it as retrieved: the reader may be gone
        await self._rest.aclose()  # the task may have been cancelled before it began

    async def _read(self) -> None:
        try:
            while (chunk := await self._endpoint.within(self._endpoint.config.idle_timeout, self._next())) is not None:
                self._chunks.put_nowait(chunk)
        except RemoteError:
            self._endpoint.breaker.fail()
            raise

    async def _next(self) -> OutputChunk | None:
        return await anext(self._rest, None)


class RemoteEndpoint:
    """A backend that forwards requests to a server with OpenAI's API.

    Args:
        config: address, time-outs and bounds.
        transport: replaces the network.
        clock: returns seconds.
        sleep: waits for seconds.

    Raises:
        ConfigError: if the address is no URL.
    """

    def __init__(
        self,
        config: CloudConfig,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.config, self._clock, self._sleep = config, clock, sleep
        self.breaker = CircuitBreaker(config.failures, config.cool_down, clock)
        headers = {"accept-encoding": "identity"}
        if config.key is not None:
            headers["authorization"] = f"Bearer {config.key}"
        try:
            httpx2.URL(config.api)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"the cloud's address {config.url!r} is no URL: {error}") from None
        timeout = httpx2.Timeout(config.read_timeout, connect=config.connect_timeout)
        self._client = httpx2.AsyncClient(timeout=timeout, headers=headers, transport=transport, trust_env=False)
        self._listed: list[str] | None = None
        self._predicts = True

    def models(self) -> list[ModelCard]:
        """Return the configured model, else those that the endpoint has listed; none before it was asked."""
        names = [self.config.model] if self.config.model else self._listed or []
        return [ModelCard(name, 0, 0, self.config.url) for name in names]

    async def generate(self, request: GenerationRequest) -> RemoteStream:
        """Send a request, with retries until a first chunk has arrived.

        Raises:
            RemoteError: if none arrives.
        """
        until = self._clock() + self.config.deadline
        attempt = 0
        while True:
            self.breaker.admit()
            try:
                return RemoteStream(self, *await self._attempt(request, until))
            except RemoteError as error:
                if error.http_status == 404:
                    self._listed = None  # its models may have changed
                if self._disable_predictions(request, error):
                    continue
                wait = error.retry_after
                if wait is None:
                    wait = self.config.backoff * 2.0**attempt * random.uniform(0.5, 1.5)
                in_time = attempt < self.config.retries and self._clock() + wait < until
                if error.http_status not in (None, *RETRIED) or not in_time or self.breaker.state != "closed":
                    raise
            attempt += 1
            await self._sleep(wait)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def within(self, seconds: float, awaited: Awaitable[Result]) -> Result:
        """Await for at most so many seconds; raise RemoteError after them, and for every network error."""
        try:
            return await asyncio.wait_for(awaited, max(0.0, seconds))
        except (asyncio.TimeoutError, httpx2.TimeoutException) as error:
            where = "connecting" if isinstance(error, httpx2.ConnectTimeout) else "waiting for it"
            raise RemoteError("cloud timed out", where, 504) from None
        except httpx2.ConnectError as error:
            raise RemoteError("cloud unreachable", str(error)) from None
        except httpx2.SSEError as error:
            raise RemoteError(GARBAGE, str(error)[:200]) from None
        except httpx2.HTTPError as error:
            raise RemoteError(BROKE_OFF, str(error) or type(error).__name__) from None
        except (ValueError, LookupError, httpx2.StreamError, httpx2.InvalidURL) as error:  # about what it sent
            raise RemoteError(GARBAGE, type(error).__name__) from None

    async def _attempt(
        self, request: GenerationRequest, until: float
    ) -> tuple[OutputChunk, AsyncGenerator[OutputChunk, None]]:
        """Send a request once; the breaker learns the outcome whatever happens."""
        outcome = self.breaker.release
        try:
            seconds = min(self.config.first_token_timeout, until - self._clock())
            begun = await self.within(seconds, self._begin(request))
            outcome = self.breaker.succeed
            return begun
        except RemoteError as error:
            if error.http_status is None or error.http_status >= 500:
                outcome = self.breaker.fail
            raise
        finally:
            outcome()

    async def _begin(self, request: GenerationRequest) -> tuple[OutputChunk, AsyncGenerator[OutputChunk, None]]:
        body = request_body(request, await self._model(request.model), self._predicts)
        rest = self._stream(request_path(request), body, request.top_logprobs is not None)
        return await anext(rest), rest

    async def _stream(self, path: str, body: dict[str, Any], logprobs: bool) -> AsyncGenerator[OutputChunk, None]:
        """Yield the chunks of a response; the connection is closed at their end or with this generator."""
        content = json.dumps(body).encode()  # ASCII, whatever characters a prompt has
        headers, limit = {"content-type": "application/json"}, self.config.max_line_bytes
        url = self.config.api + path
        async with self._client.sse(
            url, method="POST", content=content, headers=headers, max_event_size=limit
        ) as source:
            await _check(source.response)
            async for chunk in output_chunks(self._events(source), logprobs):
                yield chunk

    async def _events(self, source: httpx2.EventSource) -> AsyncIterator[str]:
        """Yield the data of each event up to ``[DONE]``, which may be missing."""
        response, events = source.response, 0
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RemoteError(GARBAGE, "it is compressed, which could unpack to any size")
        response.encoding = "utf-8"  # as the standard says, whatever the header says
        async for event in source:
            events += 1
            if event.data.strip() == DONE:
                return
            if event.data:
                yield event.data
            if response.num_bytes_downloaded > self.config.max_body_bytes:
                raise RemoteError(GARBAGE, f"more than {self.config.max_body_bytes} bytes")
        if response.num_bytes_downloaded and not events:
            raise RemoteError(GARBAGE, "its stream has no events")

    async def _model(self, asked: str) -> str:
        """Return the model name to send; the endpoint is asked once for its list."""
        if self.config.model is not None:
            return self.config.model
        if self._listed is None:
            async with self._client.stream("GET", f"{self.config.api}/models") as response:
                await _check(response)
                self._listed = model_names(await _read(response, self.config.max_body_bytes))
        return asked if asked in self._listed else self._listed[0]

    def _disable_predictions(self, request: GenerationRequest, error: RemoteError) -> bool:
        """Stop sending predictions if the endpoint has just refused one; return whether it has."""
        unknown = error.http_status in (400, 422) and "prediction" in str(error)
        if not (unknown and self._predicts and request.prediction):
            return False
        self._predicts = False
        return True


async def _check(response: httpx2.Response) -> None:
    """Raise RemoteError with the message of the body unless the status is 200."""
    status = response.status_code
    if status != 200:
        detail = error_message(await _read(response, ERROR_BYTES))
        raise refusal(status, detail, _retry_after(response.headers.get("retry-after")))


async def _read(response: httpx2.Response, limit: int) -> bytes:
    body = b""
    async for chunk in response.aiter_raw():  # compressed bodies stay compressed, and so bounded
        body += chunk
        if len(body) > limit:
            raise RemoteError(GARBAGE, f"more than {limit} bytes")
    return body


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None if it is missing or neither."""
    if header is None:
        return None
    try:
        if header.strip().isdigit():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
