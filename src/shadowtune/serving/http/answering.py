"""From a request that was let in to its response: whole, or a stream whose first piece is there before its head."""

from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http.desk import Desk
from shadowtune.serving.http.dialects import Writing, error_event
from shadowtune.serving.http.faults import error_object
from shadowtune.serving.http.flow import GONE, Flow
from shadowtune.serving.requests import Decision, Request, RequestError

BROKEN = 500
"""Status of an answer that something unforeseen broke off."""


async def respond(
    desk: Desk, requests: Sequence[Request], n: int, writing: Writing, stream: bool, receive: Receive
) -> Response:
    """Answer the requests of one HTTP request.

    Args:
        desk: lets them in.
        requests: one for each choice.
        n: choices of each prompt.
        writing: how the answer is written.
        stream: whether it comes as server-sent events.
        receive: of the connection.

    Raises:
        ShadowtuneError: if there is no answer, or not even the start of one.
    """
    flow = await desk.open(requests, n, receive)
    status = BROKEN
    streaming = False
    try:
        headers = decision_headers(flow.decision)
        if stream:
            events = writing.events(flow)
            first = await anext(events)
            streaming = True  # the response closes the flow
            return EventStream(desk, flow, first, events, headers)
        text = await writing.whole(flow)
        status = 200
        return Response(text, headers=headers, media_type="application/json")
    except ShadowtuneError as error:
        status = error.status if isinstance(error, RequestError) else 400
        raise
    finally:
        if not streaming:
            await desk.close(flow, status)


def decision_headers(decision: Decision) -> dict[str, str]:
    """Return who answered, and why, as headers."""
    headers = {
        "x-shadowtune-side": decision.side,
        "x-shadowtune-reason": _header(decision.reason),
        "x-shadowtune-cost": f"{decision.cost:g}",
    }
    if decision.confidence is not None:
        headers["x-shadowtune-confidence"] = f"{decision.confidence:.6g}"
    return headers


class EventStream(Response):
    """A stream of server-sent events that ends, and frees what it holds, however it ends.

    Args:
        desk: where the flow was opened.
        flow: the answer.
        first: its first event.
        events: the others.
        headers: of the response.
    """

    media_type = "text/event-stream"

    def __init__(self, desk: Desk, flow: Flow, first: str, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._desk, self._flow, self._first, self._events = desk, flow, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; what fails on the way becomes the last one."""
        status = BROKEN

        async def write(text: str, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await send(message)

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(self._first)
            try:
                async for event in self._events:
                    await write(event)
                status = 200
            except ShadowtuneError as error:
                told = error if isinstance(error, RequestError) else RequestError(str(error))
                status = told.status
                await write(error_event(error_object(told)))
            await write("", more=False)
        except OSError:  # how newer servers say that the client has gone
            status = GONE
        finally:
            await self._desk.close(self._flow, status)


def _header(text: str) -> str:
    """Text as a header may have it: printable ASCII on one line."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:200]
