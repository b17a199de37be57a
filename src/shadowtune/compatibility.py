"""Names that differ between the tested versions of transformers (``versions.py``).

| entry | transformers 5.23 | transformers 5.24 and later |
|---|---|---|
| ``CACHE``, the keyword and the output field of the key-value cache | ``past_key_values`` | ``cache`` |
| ``commit_of``, the commit of a model from the Hub | ``config._commit_hash`` | the Hub's cache |

Our own methods call it ``past_key_values`` and accept either name with any version.
"""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from packaging.version import Version
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache
from transformers.utils import CONFIG_NAME, ModelOutput, extract_commit_hash

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
    )  # whose import would register our models, halfway through

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


def keep_commit(model: "PreTrainedModel", revision: str | None = None, cache_dir: str | Path | None = None) -> None:
    """Keep in the config of a model that was just loaded which commit of its Hub repository it is.

    Args:
        model: the model; one of a local directory is left as it is.
        revision: that it was loaded with; None for the default branch.
        cache_dir: that it was loaded with; None for the Hub's own.
    """
    name = model.config.name_or_path
    if name and not os.path.exists(name) and vars(model.config).get("_commit_hash") is None:
        file = try_to_load_from_cache(name, CONFIG_NAME, cache_dir, revision)
        model.config._commit_hash = extract_commit_hash(file, None) if isinstance(file, str) else None


def commit_of(config: "PreTrainedConfig") -> str | None:
    """Return the commit of the Hub repository that a model's config was loaded from; None for other models.

    If the config keeps none, it is that of the only snapshot in the Hub's cache. Several snapshots give None and a
    warning, because the one that was loaded is not known.
    """
    kept: str | None = vars(config).get("_commit_hash")
    if kept is not None or not config.name_or_path or os.path.exists(config.name_or_path):
        return kept
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=config.name_or_path, repo_type="model"))
    commits = {extract_commit_hash(str(file), None) for file in folder.glob(f"snapshots/*/{CONFIG_NAME}")}
    if len(commits) > 1:
        warnings.warn(
            f"{len(commits)} revisions of {config.name_or_path} are in the cache, and the loaded one is not known: no "
            "base_revision is saved; set model.config.base_revision to save one",
            stacklevel=2,
        )
    return commits.pop() if len(commits) == 1 else None
