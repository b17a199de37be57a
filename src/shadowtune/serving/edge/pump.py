"""Pieces that are fetched in a task of their own, so that whoever reads them may be closed at any moment."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from shadowtune.serving.requests import Piece


class Pump:
    """What a coroutine puts; an asynchronous iterable.

    Its error, if it ends in one, is raised to the reader after all pieces that came before it.
    """

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.put = self._pieces.put_nowait

    def start(self, filling: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine that puts pieces."""
        self._task = asyncio.create_task(filling)
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces; after ``aclose`` those that came before it."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        assert self._task is not None
        if not self._task.cancelled():
            self._task.result()

    async def aclose(self) -> None:
        """Stop the coroutine and wait until it has stopped."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # read by nobody else if the reader is gone
