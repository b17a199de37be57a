"""What an app can turn besides answering, where whoever answers lets it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shadowtune.serving.requests import RequestError

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


def adapter_path(root: str | None, path: str) -> str:
    """Return the directory that a client may load an adapter from.

    Args:
        root: of the adapters; None takes any path.
        path: as the client names it, under the root or from it.

    Raises:
        RequestError: if it leaves the root; the same one whether it exists or not.
    """
    if root is None:
        return path
    refusal = RequestError("path must name an adapter in the server's adapter directory", 400, "path")
    try:
        home = Path(root).resolve()
        found = (home / path).resolve()
        inside = found != home and found.is_relative_to(home) and found.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, a loop of links
        raise refusal from None
    if not inside:
        raise refusal
    return str(found)
