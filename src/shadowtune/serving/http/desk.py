"""Where requests are let in, counted and seen off; the one object that an app's parts share."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from starlette.types import Receive

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.control import Counters as Numbers
from shadowtune.serving.http.flow import Flow
from shadowtune.serving.http.metrics import Metrics
from shadowtune.serving.requests import Answerer, CanFail, Request, RequestError

LOGGER = logging.getLogger(__name__)
POLL_SECONDS = 0.02
RESERVED = 4
"""One client may hold all places but this part of them, so that others find some."""


class Desk:
    """Lets requests in while there is room.

    Args:
        answerer: who answers.
        config: the limits.
        counters: numbers of whoever answers, for the metrics.
    """

    def __init__(self, answerer: Answerer, config: ServerConfig, counters: Numbers) -> None:
        self.answerer, self.config = answerer, config
        self.metrics = Metrics(counters)
        self.draining = False
        """Whether nothing more is let in, because the server is about to end."""
        self._closing = asyncio.Event()
        self._held = 0
        self._owners: Counter[str] = Counter()

    async def open(self, requests: Sequence[Request], n: int, receive: Receive) -> Flow:
        """Let the requests of one HTTP request in and hand them over; the flow must be given to ``close``.

        Args:
            requests: one for each choice.
            n: choices of each prompt.
            receive: of the connection.

        Raises:
            ShadowtuneError: if there is no room, or the answerer refuses one of them.
        """
        room, owner = self.config.max_requests, requests[0].owner
        if len(requests) > room:
            raise RequestError(f"{len(requests)} answers at once are more than this server's {room}; ask for fewer")
        if self._held + len(requests) > room:
            raise RequestError(f"{self._held} answers are under way, of at most {room}; ask again", 429)
        share = max(len(requests), room - room // RESERVED)
        if owner and self._owners[owner] + len(requests) > share:
            held = self._owners[owner]
            raise RequestError(f"{held} answers of this client are under way, of at most {share}; ask again", 429)
        self._hold(len(requests), owner)
        flow = Flow(self.answerer, requests, n, receive, self._closing, self.config.timeout)
        opened = False
        try:
            await flow.open()
            opened = True
        finally:
            if not opened:
                await flow.aclose()
                self._hold(-len(requests), owner)
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
            self._hold(-len(flow.requests), flow.requests[0].owner)
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

    def failure(self) -> str | None:
        """Why whoever answers can never answer again; None while it can."""
        return self.answerer.failure() if isinstance(self.answerer, CanFail) else None

    def _hold(self, places: int, owner: str) -> None:
        self._held += places
        self._owners[owner] += places
        self._owners += Counter()  # drops those that hold nothing
        self.metrics.under_way.set(self._held)
