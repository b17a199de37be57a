"""What an app can turn besides answering, where whoever answers lets it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Counters = Callable[[], Mapping[str, float]]
"""Numbers of the moment, by names of lower-case letters and underscores: what runs, what waits, what was done."""


class PolicyControl(Protocol):
    """A policy that decides who answers, as ``/v1/policy`` shows and changes it."""

    def describe(self) -> Mapping[str, Any]:
        """Return ``kind``, ``threshold``, ``signal`` and ``curve``: None, None and an empty list where it has none.

        A point of the curve has threshold, accuracy, hand_over_rate and cost.
        """

    def set_threshold(self, threshold: float) -> None:
        """Decide by another threshold from now on.

        Raises:
            ShadowtuneError: if the policy has none, or it is out of its range.
        """


class AdapterControl(Protocol):
    """The adapters that a server has loaded."""

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a directory of the server and answer for it by a name.

        Raises:
            ShadowtuneError: if the name is taken, or the directory holds no adapter of this base.
        """

    async def unload(self, name: str) -> None:
        """Forget an adapter; what it began ends first.

        Raises:
            RequestError: if there is none of that name.
        """
