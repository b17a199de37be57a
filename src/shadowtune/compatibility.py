"""Names that differ between the tested versions of transformers (``versions.py``).

| entry | transformers 5.23 | transformers 5.24 and later |
|---|---|---|
| ``CACHE``, the keyword and the output field of the key-value cache | ``past_key_values`` | ``cache`` |

Our own methods call it ``past_key_values`` and accept either name with any version.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from packaging.version import Version
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

CACHE: Literal["cache", "past_key_values"] = (
    "cache" if Version(transformers_version).release >= (5, 24) else "past_key_values"
)
"""Name of the key-value cache in decoder blocks, models and their outputs."""
CACHE_NAMES = ("past_key_values", "cache")
"""Both names; callers may use either."""

Method = TypeVar("Method", bound=Callable[..., Any])


def cache_of(output: ModelOutput) -> Cache | None:
    """Return the key-value cache of a model's output; None if it has none."""
    return output.get(CACHE)


def set_cache(output: ModelOutput, cache: Cache | None) -> None:
    """Put a key-value cache into a model's output."""
    setattr(output, CACHE, cache)


def pop_cache(keywords: dict[str, Any]) -> Cache | None:
    """Remove the key-value cache from keyword arguments, under either name, and return it.

    Raises:
        TypeError: if two different caches were passed.
    """
    given = [cache for name in CACHE_NAMES if (cache := keywords.pop(name, None)) is not None]
    if len(given) == 2 and given[0] is not given[1]:
        raise TypeError("cache and past_key_values are two names of one argument; pass one of them")
    return given[0] if given else None


def takes_cache(method: Method) -> Method:
    """Decorate a method with a parameter ``past_key_values`` such that it accepts the keyword ``cache`` as well."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            kwargs["past_key_values"] = pop_cache(kwargs)
        return method(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]
