"""A circuit breaker: a cloud that keeps failing is left alone for a while, then one request tries it."""

import time
from collections.abc import Callable
from typing import Literal

from shadowtune.serving.requests import RequestError


class CloudError(RequestError):
    """A cloud that does not answer as it should.

    Args:
        reason: a few words for the one who asked, as ``Decision.reason`` tells them.
        detail: more, for the message.
        status: the HTTP status that says so.
    """

    def __init__(self, reason: str, detail: str = "", status: int = 502) -> None:
        super().__init__(reason + (f": {detail}" if detail else ""), status)
        self.reason = reason


class Breaker:
    """Counts failures of a cloud.

    Args:
        failures: in a row, after which it opens.
        cool_down: seconds for which it stays open.
        clock: tells the seconds.
    """

    def __init__(self, failures: int, cool_down: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cool_down, self._clock = failures, cool_down, clock
        self._failed = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Closed lets all requests through, open none, half-open one."""
        if self._opened is None:
            return "closed"
        return "open" if self._clock() < self._opened + self._cool_down else "half-open"

    def admit(self) -> None:
        """Let an attempt begin; ``succeed``, ``fail`` or ``release`` must follow.

        Raises:
            CloudError: if none may.
        """
        state = self.state
        if state == "open" or (state == "half-open" and self._probing):
            raise CloudError("cloud circuit open", f"it failed {self._failed} times in a row", 503)
        self._probing = state == "half-open"

    def succeed(self) -> None:
        """An attempt got an answer."""
        self._failed, self._opened, self._probing = 0, None, False

    def fail(self) -> None:
        """An attempt got none, or one that broke off."""
        self._failed += 1
        if self._probing or self._failed >= self._limit:
            self._opened = self._clock()
        self._probing = False

    def release(self) -> None:
        """An attempt was given up before it could tell."""
        self._probing = False
