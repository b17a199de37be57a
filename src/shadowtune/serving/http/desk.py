"""Where requests are let in, counted and seen off; the one object that an app's parts share."""

import asyncio
import logging
import time
from collections.abc import Sequence

from starlette.types import Receive

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.control import Counters
from shadowtune.serving.http.flow import Flow
from shadowtune.serving.http.metrics import Metrics
from shadowtune.serving.requests import Answerer, Request, RequestError

LOGGER = logging.getLogger(__name__)
POLL_SECONDS = 0.02


class Desk:
    """Lets requests in while there is room.

    Args:
        answerer: who answers.
        config: the limits.
        counters: numbers of whoever answers, for the metrics.
    """

    def __init__(self, answerer: Answerer, config: ServerConfig, counters: Counters) -> None:
        self.answerer, self.config = answerer, config
        self.metrics = Metrics(counters)
        self.draining = False
        """Whether nothing more is let in, because the server is about to end."""
        self._closing = asyncio.Event()
        self._held = 0

    async def open(self, requests: Sequence[Request], n: int, receive: Receive) -> Flow:
        """Let the requests of one HTTP request in and hand them over; the flow must be given to ``close``.

        Args:
            requests: one for each choice.
            n: choices of each prompt.
            receive: of the connection.

        Raises:
            ShadowtuneError: if there is no room, or the answerer refuses one of them.
        """
        room = self.config.max_requests
        if len(requests) > room:
            raise RequestError(f"{len(requests)} answers at once are more than this server's {room}; ask for fewer")
        if self._held + len(requests) > room:
            raise RequestError(f"{self._held} answers are under way, of at most {room}; ask again", 429)
        self._hold(len(requests))
        flow = Flow(self.answerer, requests, n, receive, self._closing, self.config.timeout)
        opened = False
        try:
            await flow.open()
            opened = True
        finally:
            if not opened:
                await flow.aclose()
                self._hold(-len(requests))
        return flow

    async def close(self, flow: Flow, status: int) -> None:
        """See a flow off.

        Args:
            flow: of ``open``.
            status: 200 if it was answered to its end, else the error's.
        """
        decision, usage = flow.decision, flow.usage
        try:
            if usage is None:
                self.metrics.broke(status)
            else:
                self.metrics.answered(flow)
        finally:
            await flow.aclose()
            self._hold(-len(flow.requests))
        tokens = "unfinished" if usage is None else f"{usage.prompt_tokens}+{usage.completion_tokens} tokens"
        seconds = time.monotonic() - flow.begun
        model = flow.requests[0].model
        LOGGER.info(
            "%s: %s (%s), %s, status %d, %.3f s", model, decision.side, decision.reason, tokens, status, seconds
        )
        if self.config.log_prompts:
            asked = [request.prompt if request.messages is None else request.messages for request in flow.requests]
            LOGGER.info("asked %r, answered %r", asked, ["".join(text) for text in flow.texts])

    async def drain(self, seconds: float) -> None:
        """Let nothing more in, wait for what was begun, and after so many seconds break it off."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._held and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self._closing.set()

    def _hold(self, places: int) -> None:
        self._held += places
        self.metrics.under_way.set(self._held)
