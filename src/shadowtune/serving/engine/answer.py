"""An answer on its way from the engine's thread to a coroutine."""

import asyncio
from collections.abc import AsyncIterator, Callable

from shadowtune.serving.requests import Decision, Piece, RequestError


class EngineAnswer:
    """The pieces of one answer; made inside the loop that reads them.

    Args:
        decision: who answers.
        on_end: called with the answer once nothing more can come.
    """

    def __init__(self, decision: Decision, on_end: Callable[["EngineAnswer"], None]) -> None:
        self.decision = decision
        self.ended = asyncio.Event()
        """Set once the engine holds nothing of it any more."""
        self.cancel: Callable[[], None] = lambda: None
        """Asks the engine to stop."""
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | RequestError | None] = asyncio.Queue()
        self._on_end = on_end

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces that are left; raises RequestError where the engine could not go on."""
        return self._read()

    async def aclose(self) -> None:
        """Stop answering, and wait until the row is free."""
        if not self.ended.is_set():
            self.cancel()
            await self.ended.wait()

    def deliver(self, item: Piece | RequestError | None) -> None:
        """Take the next item, in any thread; None is the end."""
        try:
            self._loop.call_soon_threadsafe(self._take, item)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel()
            if item is None:
                self._on_end(self)

    def _take(self, item: Piece | RequestError | None) -> None:
        self._pieces.put_nowait(item)
        if item is None:
            self._on_end(self)
            self.ended.set()

    async def _read(self) -> AsyncIterator[Piece]:
        while (item := await self._pieces.get()) is not None:
            if isinstance(item, RequestError):
                raise item
            yield item
        self._pieces.put_nowait(None)  # for whoever reads on
