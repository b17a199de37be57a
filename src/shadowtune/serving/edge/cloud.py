"""Any server with OpenAI's API as an Answerer: time-outs, retries, a circuit breaker, and no trust in what it sends."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from shadowtune.config.cloud import CloudConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.breaker import Breaker, CloudError
from shadowtune.serving.edge.events import BROKE_OFF, GARBAGE, ODD, error_message, events, read_json
from shadowtune.serving.edge.pump import Pump
from shadowtune.serving.edge.wire import body_of, path_of, pieces
from shadowtune.serving.requests import Decision, ModelCard, Piece, Request

TIMED_OUT = "cloud timed out"
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be another a moment later."""
NOT_FOUND, BUSY = 404, 429
ERROR_BYTES = 65536
"""Read of a refusal's body at most."""
Result = TypeVar("Result")


class CloudAnswer:
    """An answer of a cloud that is on its way; its first piece has come."""

    def __init__(self, cloud: "Cloud", first: Piece, rest: AsyncGenerator[Piece, None]) -> None:
        self.decision = Decision("cloud", "asked")
        self._cloud, self._first, self._rest = cloud, first, rest
        self._pump = Pump()
        self._pump.start(self._fill())

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces as they come.

        Raises:
            CloudError: if the cloud breaks off.
        """
        return aiter(self._pump)

    async def aclose(self) -> None:
        """Close the connection, which tells the cloud to stop."""
        await self._pump.aclose()

    async def _fill(self) -> None:
        self._pump.put(self._first)
        try:
            async with contextlib.aclosing(self._rest):
                while (piece := await self._cloud.within(self._cloud.config.idle_timeout, self._next())) is not None:
                    self._pump.put(piece)
        except CloudError:
            self._cloud.breaker.fail()
            raise

    async def _next(self) -> Piece | None:
        return await anext(self._rest, None)


class Cloud:
    """A far server.

    Args:
        config: where it is, and for how long it is waited for.
        transport: in place of the network.
        clock: tells the seconds.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        config: CloudConfig,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.config, self._clock, self._sleep = config, clock, sleep
        self.breaker = Breaker(config.failures, config.cool_down, clock)
        timeouts = httpx.Timeout(config.read_timeout, connect=config.connect_timeout)
        headers = {"accept-encoding": "identity"}  # nothing is unpacked, so nothing can unpack to more than it is
        if config.key is not None:
            headers["authorization"] = f"Bearer {config.key}"
        try:
            httpx.URL(config.api)
        except httpx.InvalidURL as error:
            raise ConfigError(f"the cloud's address {config.url!r} is no URL: {error}") from None
        self._client = httpx.AsyncClient(timeout=timeouts, headers=headers, transport=transport, trust_env=False)
        self._listed: list[str] | None = None
        self._predicts = True

    def models(self) -> list[ModelCard]:
        """The model that it is asked for, if it is known."""
        names = [self.config.model] if self.config.model else self._listed or []
        return [ModelCard(name, 0, 0, self.config.url) for name in names]

    async def answer(self, request: Request) -> CloudAnswer:
        """Ask, again if need be, until a first piece of an answer has come.

        Raises:
            CloudError: if none comes.
        """
        until = self._clock() + self.config.deadline
        attempt = 0
        while True:
            self.breaker.admit()
            try:
                return CloudAnswer(self, *await self._attempt(request, until))
            except _RefusalError as refusal:
                if refusal.status_code == NOT_FOUND:
                    self._listed = None  # it may have other models by now
                if self._forget_predictions(request, refusal):
                    continue
                wait = self._pause(attempt) if refusal.wait is None else refusal.wait
                if not refusal.again or not self._worth(attempt, wait, until):
                    raise
            except CloudError:
                wait = self._pause(attempt)
                if not self._worth(attempt, wait, until):
                    raise
            attempt += 1
            await self._sleep(wait)

    async def _attempt(self, request: Request, until: float) -> tuple[Piece, AsyncGenerator[Piece, None]]:
        """Ask once, and tell the breaker, whatever happens, what came of it."""
        outcome = self.breaker.release
        try:
            seconds = min(self.config.first_token_timeout, until - self._clock())
            begun = await self.within(seconds, self._begin(request))
            outcome = self.breaker.succeed
            return begun
        except CloudError as error:
            if not isinstance(error, _RefusalError) or error.status_code >= 500:
                outcome = self.breaker.fail
            raise
        finally:
            outcome()

    async def within(self, seconds: float, awaited: Awaitable[Result]) -> Result:
        """Await something for so many seconds; raises CloudError after them, and for all that the network can do."""
        try:
            return await asyncio.wait_for(awaited, max(0.0, seconds))
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            where = "connecting" if isinstance(error, httpx.ConnectTimeout) else "waiting for it"
            raise CloudError(TIMED_OUT, where, 504) from None
        except httpx.ConnectError as error:
            raise CloudError("cloud unreachable", str(error)) from None
        except httpx.HTTPError as error:
            raise CloudError(BROKE_OFF, str(error) or type(error).__name__) from None
        except (*ODD, httpx.StreamError, httpx.InvalidURL) as error:  # of what it sent
            raise CloudError(GARBAGE, type(error).__name__) from None

    async def aclose(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def _begin(self, request: Request) -> tuple[Piece, AsyncGenerator[Piece, None]]:
        body = body_of(request, await self._model(request.model), self._predicts)
        async with contextlib.AsyncExitStack() as stack:
            rest = self._stream(path_of(request), body, request.top_logprobs is not None)
            stack.push_async_callback(rest.aclose)  # if cancelled, too: the connection must not stay open
            first = await anext(rest)
            stack.pop_all()
        return first, rest

    async def _stream(self, path: str, body: dict[str, Any], told: bool) -> AsyncGenerator[Piece, None]:
        """Give an answer's pieces, and close the connection at their end or with this."""
        content = json.dumps(body).encode()  # in ASCII, whatever characters a prompt has
        kind = {"content-type": "application/json"}
        async with self._client.stream("POST", self.config.api + path, content=content, headers=kind) as response:
            await _check(response)
            sent = response.headers.get("content-type", "").partition(";")[0].strip()
            if sent != "text/event-stream":
                raise CloudError(GARBAGE, f"it answered with {sent[:40] or 'nothing'} where a stream was asked for")
            limits = (self.config.max_line_bytes, self.config.max_body_bytes)
            async for piece in pieces(events(response.aiter_raw(), *limits), told):
                yield piece

    async def _model(self, asked: str) -> str:
        """Return what the cloud is asked for; asks it once what it has."""
        if self.config.model is not None:
            return self.config.model
        if self._listed is None:
            async with self._client.stream("GET", f"{self.config.api}/models") as response:
                await _check(response)
                self._listed = _names(await _read(response, self.config.max_body_bytes))
        return asked if asked in self._listed else self._listed[0]

    def _forget_predictions(self, request: Request, refusal: "_RefusalError") -> bool:
        """Whether the cloud refused because it does not know predictions, which it gets no more of."""
        unknown = refusal.status_code in (400, 422) and "prediction" in str(refusal)
        if not (unknown and self._predicts and request.prediction):
            return False
        self._predicts = False
        return True

    def _worth(self, attempt: int, wait: float, until: float) -> bool:
        """Whether there is another attempt, time for it, and a breaker that lets it through."""
        return attempt < self.config.retries and self._clock() + wait < until and self.breaker.state == "closed"

    def _pause(self, attempt: int) -> float:
        return self.config.backoff * 2.0**attempt * random.uniform(0.5, 1.5)


class _RefusalError(CloudError):
    """An answer with another status than 200."""

    def __init__(self, status: int, detail: str, wait: float | None) -> None:
        super().__init__("cloud busy" if status == BUSY else f"cloud answered {status}", detail)
        self.status_code, self.again = status, status in RETRIED
        self.wait = wait
        """Seconds that it asks to wait."""


async def _check(response: httpx.Response) -> None:
    """Raise _RefusalError, with the reason that the body gives, unless the status is 200."""
    if response.status_code == 200:
        return
    body = await _read(response, ERROR_BYTES)
    try:
        detail = error_message(read_json(body))
    except ODD:
        detail = ""
    raise _RefusalError(response.status_code, detail, _wait(response.headers.get("retry-after")))


async def _read(response: httpx.Response, limit: int) -> bytes:
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            raise CloudError(GARBAGE, f"more than {limit} bytes")
    return body


def _names(body: bytes) -> list[str]:
    try:
        names = [str(entry["id"]) for entry in read_json(body)["data"]]
    except ODD:
        names = []
    if not names:
        raise CloudError(GARBAGE, "it lists no models; name one with --cloud-model")
    return names


def _wait(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None if it is missing or something else."""
    if header is None:
        return None
    try:
        if header.strip().isdigit():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
