"""Work outside of the event loop: a daemon thread, and calls that share one run."""

import asyncio
import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonThread:
    """Runs functions one after another in a thread that never keeps the process alive.

    ``ThreadPoolExecutor`` joins its threads at interpreter exit, so a model that hangs would keep a server from ending.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Queue a function; cancelling the future before it runs removes it."""
        future: Future[Result] = Future()
        self._work.put((future, function))
        return future

    def close(self, seconds: float) -> bool:
        """End the thread after what is queued; return whether it ended within so many seconds."""
        self._work.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:  # raised where the future is awaited; the thread goes on
                future.set_exception(error)
            else:
                future.set_result(result)


class SharedWork:
    """Runs functions in a ``DaemonThread``; concurrent calls with the same key share one run."""

    def __init__(self, name: str) -> None:
        self._thread = DaemonThread(name)
        self._running: dict[Hashable, asyncio.Future[Any]] = {}
        self._callers: dict[Hashable, int] = {}

    async def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Return the function's result, or that of a run with the same key that has not ended.

        Cancelling a caller leaves the run to the others; cancelling the last one removes it from the queue.
        """
        shared = self._running.get(key)
        if shared is None:
            shared = asyncio.wrap_future(self._thread.submit(function))
            self._running[key] = shared
        self._callers[key] = self._callers.get(key, 0) + 1
        try:
            result: Result = await asyncio.shield(shared)
            return result
        finally:
            self._callers[key] -= 1
            if not self._callers[key]:
                del self._callers[key], self._running[key]
                shared.cancel()  # no effect on a run that has ended

    def close(self, seconds: float) -> bool:
        """As ``DaemonThread.close``."""
        return self._thread.close(seconds)
