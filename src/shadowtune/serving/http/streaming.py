"""From admitted requests to a response: outputs merged as they come, within the deadline, closed whatever happens."""

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http.admission import AdmissionController
from shadowtune.serving.http.errors import error_object
from shadowtune.serving.http.serializers import Serializer
from shadowtune.serving.requests import (
    GenerationRequest,
    GenerationStream,
    OutputChunk,
    RequestError,
    RoutingDecision,
    Usage,
)

LOGGER = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
"""Seconds to wait for a generation stream that is stopping."""
DISCONNECTED = 499
"""Status of a request whose client has disconnected; for logs and metrics."""
FAILED = 500
"""Status of a response that an unforeseen error ended."""


class ResponseStream:
    """The outputs of one HTTP request.

    Args:
        admission: limits, backend and metrics.
        requests: one for each choice.
        n: choices of each prompt.
        receive: of the connection, its body read; it reports when the client disconnects.
    """

    def __init__(
        self, admission: AdmissionController, requests: Sequence[GenerationRequest], n: int, receive: Receive
    ) -> None:
        self.requests = requests
        self._admission, self._n = admission, n
        self._started = time.monotonic()
        self._first: float | None = None
        self._deadline = self._started + admission.config.timeout
        self._disconnected = asyncio.ensure_future(_disconnect(receive))
        self._closing = asyncio.ensure_future(admission.closing.wait())
        self._streams: list[GenerationStream] = []
        self._texts: list[list[str]] = [[] for _ in requests]
        self._usages: dict[int, Usage] = {}
        self.so_far = [Usage(0, 0)] * len(requests)
        """Usage of each choice so far; some backends report the prompt's tokens only at the end, 0 until then."""

    async def open(self) -> None:
        """Submit the requests; all are accepted or none is.

        Raises:
            ShadowtuneError: if one is refused, or the decision takes too long.
        """
        tasks = [asyncio.ensure_future(self._admission.backend.generate(request)) for request in self.requests]
        pending = set(tasks)
        try:
            while pending:
                done = await self._wait(pending)
                pending -= done
                for task in done:
                    _result(task)
        finally:
            await _cancel(pending)
            self._streams = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]

    @property
    def decision(self) -> RoutingDecision:
        """Decision of the first choice, with the cost of all."""
        cost = sum(stream.decision.cost for stream in self._streams)
        return replace(self._streams[0].decision, cost=cost)

    @property
    def usage(self) -> Usage | None:
        """Usage of all choices, once all have ended; a prompt with ``n`` choices counts once."""
        usages = [self._usages[index] for index in sorted(self._usages)]
        if len(usages) < len(self.requests):
            return None
        return Usage(
            sum(usage.prompt_tokens for usage in usages[:: self._n]),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.accepted_prediction_tokens for usage in usages),
            sum(usage.rejected_prediction_tokens for usage in usages),
        )

    async def chunks(self) -> AsyncIterator[tuple[int, OutputChunk]]:
        """Iterate over the chunks of all choices as they come, each with the index of its choice.

        Raises:
            ShadowtuneError: if a backend fails or takes too long, the client disconnects, or the server ends.
        """
        sources = [aiter(stream) for stream in self._streams]
        steps: dict[asyncio.Future[OutputChunk], int] = {}
        try:
            for index, source in enumerate(sources):
                steps[asyncio.ensure_future(anext(source))] = index
            while steps:
                for task in await self._wait(steps):
                    index, chunk = steps.pop(task), _result(task)
                    self._count(index, chunk)
                    if chunk.finish_reason is None:
                        steps[asyncio.ensure_future(anext(sources[index]))] = index
                    yield index, chunk
        finally:
            await _cancel(steps)

    async def whole(self) -> list[OutputChunk]:
        """Wait for all outputs, and return each as one chunk; raises as ``chunks``."""
        outputs: list[list[OutputChunk]] = [[] for _ in self.requests]
        async for index, chunk in self.chunks():
            outputs[index].append(chunk)
        return [_join(chunks) for chunks in outputs]

    async def events(self, serializer: Serializer) -> AsyncIterator[str]:
        """Iterate over the server-sent events, the first of them once there is a first chunk; raises as ``chunks``."""
        begun = False
        async for index, chunk in self.chunks():
            if not begun:
                for event in serializer.begin(self.so_far):
                    yield event
            begun = True
            last = None if self.usage is None else self.decision
            for event in serializer.events(index, chunk, self.so_far[index], last):
                yield event
        assert self.usage is not None
        for event in serializer.end(self.usage, self.decision):
            yield event

    async def close(self, status: int) -> None:
        """Count and log the request, stop all generation streams, and free the capacity.

        Args:
            status: 200 if the outputs reached their end, else that of the error.
        """
        decision, usage, metrics = self.decision, self.usage, self._admission.metrics
        now, model = time.monotonic(), self.requests[0].model
        seconds = now - self._started
        try:
            if usage is None:
                metrics.broken(status)
            else:
                metrics.completed(model, decision, usage, seconds, (self._first or now) - self._started)
        finally:
            await self.aclose()
        tokens = "unfinished" if usage is None else f"{usage.prompt_tokens}+{usage.completion_tokens} tokens"
        LOGGER.info(
            "%s: %s (%s), %s, status %d, %.3f s", model, decision.side, decision.reason, tokens, status, seconds
        )
        if self._admission.config.log_prompts:
            asked = [request.prompt if request.messages is None else request.messages for request in self.requests]
            LOGGER.info("asked %r, answered %r", asked, ["".join(text) for text in self._texts])

    async def aclose(self) -> None:
        """Stop all generation streams, and free the capacity."""
        streams, self._streams = self._streams, []
        self._disconnected.cancel()
        self._closing.cancel()
        closing = {asyncio.ensure_future(stream.aclose()) for stream in streams}
        try:
            if closing:
                await asyncio.wait(closing, timeout=CLOSE_SECONDS)
            await _cancel(closing)
        finally:
            self._admission.release(self.requests[0].owner, len(self.requests))
        for task in closing:
            if not task.cancelled() and (error := task.exception()) is not None:
                LOGGER.error("an answer could not be closed: %s", type(error).__name__)

    def _count(self, index: int, chunk: OutputChunk) -> None:
        """Keep what is reported about the outputs."""
        known, news = self.so_far[index], bool(chunk.text or chunk.tokens)
        counted = replace(known, completion_tokens=known.completion_tokens + news)  # where a backend does not count
        self.so_far[index] = chunk.usage or chunk.usage_so_far or counted
        if chunk.usage is not None:
            self._usages[index] = chunk.usage
        self._texts[index].append(chunk.text)
        if self._first is None and news:
            self._first = time.monotonic()

    async def _wait(self, tasks: Iterable["asyncio.Future[Any]"]) -> set["asyncio.Future[Any]"]:
        """Wait for some of the tasks, and return those that are done."""
        watched, stops = set(tasks), {self._disconnected, self._closing}
        left = max(0.0, self._deadline - time.monotonic())
        await asyncio.wait(watched | stops, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if self._disconnected.done():
            raise RequestError("the client has gone", DISCONNECTED)
        done = {task for task in watched if task.done()}
        if not done and self._closing.done():
            raise RequestError("the server is shutting down; ask again", 503)
        if not done:
            timeout = self._admission.config.timeout
            raise RequestError(f"no whole answer within {timeout:g} s; ask for fewer tokens", 504)
        return done


async def respond(
    admission: AdmissionController,
    requests: Sequence[GenerationRequest],
    n: int,
    serializer: Serializer,
    stream: bool,
    receive: Receive,
) -> Response:
    """Generate the outputs of one HTTP request, and return its response.

    A stream's first chunk is awaited here, so that an error before it becomes a status.

    Args:
        admission: limits, backend and metrics.
        requests: one for each choice.
        n: choices of each prompt.
        serializer: writes the outputs.
        stream: whether to respond with server-sent events.
        receive: of the connection.

    Raises:
        ShadowtuneError: if there is no room, or generation fails before the response begins.
    """
    admission.acquire(requests[0].owner, len(requests))
    outputs = ResponseStream(admission, requests, n, receive)
    opened = handed_over = False
    status = FAILED
    try:
        await outputs.open()
        opened = True
        headers = decision_headers(outputs.decision)
        if stream:
            events = outputs.events(serializer)
            first = await anext(events)
            handed_over = True  # the response closes the outputs
            return EventStreamResponse(outputs, first, events, headers)
        whole = await outputs.whole()
        assert outputs.usage is not None
        text = serializer.whole(whole, outputs.usage, outputs.decision)
        status = 200
        return Response(text, headers=headers, media_type="application/json")
    except ShadowtuneError as error:
        status = error.status if isinstance(error, RequestError) else 400
        raise
    finally:
        if not opened:
            await outputs.aclose()
        elif not handed_over:
            await outputs.close(status)


def decision_headers(decision: RoutingDecision) -> dict[str, str]:
    """Return the response headers with the side that answered, and the reason."""
    printable = "".join(letter if " " <= letter <= "~" else "?" for letter in decision.reason)[:200]
    headers = {
        "x-shadowtune-side": decision.side,
        "x-shadowtune-reason": printable,
        "x-shadowtune-cost": f"{decision.cost:g}",
    }
    if decision.confidence is not None:
        headers["x-shadowtune-confidence"] = f"{decision.confidence:.6g}"
    return headers


class EventStreamResponse(Response):
    """A response of server-sent events that closes its outputs, however it ends.

    Starlette's ``StreamingResponse`` does not close its iterator when the client disconnects.

    Args:
        outputs: the source of the events.
        first: the first event.
        events: the others.
        headers: of the response.
    """

    media_type = "text/event-stream"

    def __init__(
        self, outputs: ResponseStream, first: str, events: AsyncIterator[str], headers: dict[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._outputs, self._first, self._events = outputs, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; an error on the way becomes the last one."""
        status = FAILED

        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(self._first)
            try:
                async for event in self._events:
                    await write(event)
                status = 200
            except ShadowtuneError as error:
                failure = error if isinstance(error, RequestError) else RequestError(str(error))
                status = failure.status
                await write(f"data: {json.dumps(error_object(failure))}\n\n")
            await write("", more=False)
        except OSError:  # how newer servers report a disconnect
            status = DISCONNECTED
        finally:
            await self._outputs.close(status)


def _join(chunks: Sequence[OutputChunk]) -> OutputChunk:
    """Concatenate the chunks of one output."""
    text = "".join(chunk.text for chunk in chunks)
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    calls = tuple(call for chunk in chunks for call in chunk.tool_calls)
    return OutputChunk(text, tokens, chunks[-1].finish_reason, chunks[-1].usage, calls)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _result(task: "asyncio.Future[Any]") -> Any:
    """Return a task's result; unforeseen errors are logged without their message, which may quote a prompt."""
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, ShadowtuneError):
        raise error
    LOGGER.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    raise RequestError("the model failed; the server's log has the cause", 500)


async def _cancel(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel the tasks that are not done, and wait for all."""
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
