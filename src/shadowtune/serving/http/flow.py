"""Answers on their way to one client: in time, only while it is there, and closed whatever happens."""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from starlette.types import Receive

from shadowtune.errors import ShadowtuneError
from shadowtune.serving.http.replies import total_usage
from shadowtune.serving.requests import Answer, Answerer, Decision, Piece, Request, RequestError, Usage

LOGGER = logging.getLogger(__name__)
CLOSING_SECONDS = 10.0
"""For which an answer that was told to stop is waited for."""
GONE = 499
"""Status of a request whose client has gone; nobody reads it."""


class Flow:
    """The answers to one HTTP request.

    Args:
        answerer: who answers.
        requests: one for each choice.
        n: choices of each prompt.
        receive: of the connection, its body read; tells when the client goes.
        closing: set when the server wants an end.
        timeout: seconds until the last answer has to be whole.
    """

    def __init__(
        self,
        answerer: Answerer,
        requests: Sequence[Request],
        n: int,
        receive: Receive,
        closing: asyncio.Event,
        timeout: float,
    ) -> None:
        self.requests = requests
        self.begun = time.monotonic()
        self.first: float | None = None
        """When the first text or token came, on the clock of ``begun``."""
        self._answerer, self._n = answerer, n
        self._timeout, self._deadline = timeout, self.begun + timeout
        self._gone = asyncio.ensure_future(_until_gone(receive))
        self._closing = asyncio.ensure_future(closing.wait())
        self._answers: list[Answer] = []
        self.texts: list[list[str]] = [[] for _ in requests]
        """What each choice has said so far."""
        self._usages: dict[int, Usage] = {}
        self._running = [Usage(0, 0)] * len(requests)

    async def open(self) -> None:
        """Hand the requests over; all are accepted or none is.

        Raises:
            ShadowtuneError: if one is refused, or deciding takes too long.
        """
        tasks = [asyncio.ensure_future(self._answerer.answer(request)) for request in self.requests]
        pending = set(tasks)
        try:
            while pending:
                done = await self._wait(pending)
                pending -= done
                for task in done:
                    _result(task)
        finally:
            await _settle(pending)
            self._answers = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]

    @property
    def decision(self) -> Decision:
        """Who answers, and why: of the first choice, at the cost of all."""
        cost = sum(answer.decision.cost for answer in self._answers)
        return replace(self._answers[0].decision, cost=cost)

    @property
    def usage(self) -> Usage | None:
        """Of all choices, once all have ended."""
        ended = [self._usages[index] for index in sorted(self._usages)]
        return total_usage(ended, self._n) if len(ended) == len(self.requests) else None

    def running_usage(self, index: int) -> Usage:
        """What one choice took so far; where only the end tells the prompt's tokens, these are 0 until then."""
        return self._usages.get(index, self._running[index])

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Give the pieces of all choices as they come, each with the number of its choice.

        Raises:
            ShadowtuneError: if an answer fails or takes too long, the client goes, or the server ends.
        """
        sources = [aiter(answer) for answer in self._answers]
        steps: dict[asyncio.Future[Piece], int] = {}
        try:
            for index, source in enumerate(sources):
                steps[asyncio.ensure_future(anext(source))] = index
            while steps:
                for task in await self._wait(steps):
                    index, piece = steps.pop(task), _result(task)
                    self._running[index] = piece.running or _one_more(self._running[index], piece)
                    if piece.usage is not None:
                        self._usages[index] = piece.usage
                    if piece.finish_reason is None:
                        steps[asyncio.ensure_future(anext(sources[index]))] = index
                    self.texts[index].append(piece.text)
                    if self.first is None and (piece.text or piece.tokens):
                        self.first = time.monotonic()
                    yield index, piece
        finally:
            await _settle(steps)

    async def whole(self) -> list[Piece]:
        """Wait for all of it and give each choice as one piece.

        Raises:
            ShadowtuneError: as ``pieces``.
        """
        choices: list[list[Piece]] = [[] for _ in self.requests]
        async for index, piece in self.pieces():
            choices[index].append(piece)
        return [joined(pieces) for pieces in choices]

    async def aclose(self) -> None:
        """Stop all answers; they hold nothing afterwards."""
        answers, self._answers = self._answers, []
        self._gone.cancel()
        self._closing.cancel()
        closing = {asyncio.ensure_future(answer.aclose()) for answer in answers}
        if closing:
            await asyncio.wait(closing, timeout=CLOSING_SECONDS)
        await _settle(closing)
        for task in closing:
            if not task.cancelled() and (error := task.exception()) is not None:
                LOGGER.error("an answer could not be closed: %s", type(error).__name__)

    async def _wait(self, tasks: Iterable["asyncio.Future[Any]"]) -> set["asyncio.Future[Any]"]:
        """Wait for some of the tasks, and return those that are done."""
        watched = set(tasks)
        left = max(0.0, self._deadline - time.monotonic())
        stops = {self._gone, self._closing}
        await asyncio.wait(watched | stops, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            raise RequestError("the client has gone", GONE)
        done = {task for task in watched if task.done()}
        if not done and self._closing.done():
            raise RequestError("the server is shutting down; ask again", 503)
        if not done:
            raise RequestError(f"no whole answer within {self._timeout:g} s; ask for fewer tokens", 504)
        return done


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of one answer as one."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    calls = tuple(call for piece in pieces for call in piece.tool_calls)
    return Piece(text, tokens, pieces[-1].finish_reason, pieces[-1].usage, calls)


def _one_more(usage: Usage, piece: Piece) -> Usage:
    """Count a piece as a token where its tokens are not told."""
    return replace(usage, completion_tokens=usage.completion_tokens + bool(piece.text or piece.tokens))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _result(task: "asyncio.Future[Any]") -> Any:
    """The task's result; what fails without saying why on purpose is logged, without words that may quote a prompt."""
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, ShadowtuneError):
        raise error
    LOGGER.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    raise RequestError("the model failed; the server's log has the cause", 500)


async def _settle(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel what is not done, and wait until it is."""
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
