"""Tested versions of the dependencies: the requirements in ``pyproject.toml``, and a warning outside of them.

The warning comes when transformers is first used; ``attach`` additionally checks two tokens (``attach/self_check.py``).
"""

import functools
import sys
import warnings
from importlib import metadata

from packaging.requirements import Requirement


class UntestedVersionWarning(UserWarning):
    """An installed dependency has a version outside the range that this package was tested with."""


@functools.cache
def untested_versions() -> dict[str, str]:
    """Return the installed core dependencies with a version outside the tested range.

    Returns:
        name -> ``"5.30.0, tested >=5.23,<5.25"``; empty if all are inside, or if the package was not installed.
    """
    try:
        stated = metadata.requires("shadowtune") or []
    except metadata.PackageNotFoundError:
        return {}
    untested = {}
    for requirement in map(Requirement, stated):
        if requirement.marker is not None:  # an extra
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:  # installed without dependencies, beside vLLM for instance
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            untested[requirement.name] = f"{installed}, tested {requirement.specifier}"
    return untested


def warn_of_untested_versions() -> None:
    """Warn with ``UntestedVersionWarning`` if a core dependency is outside the tested range.

    Not in a process of vLLM, which needs older versions: its plugin has its own range (``serving/vllm/support.py``).
    """
    if "vllm" in sys.modules:
        return
    untested = untested_versions()
    if untested:
        listed = "; ".join(f"{name} {found}" for name, found in untested.items())
        warnings.warn(
            f"shadowtune was not tested with the installed {listed}; install a tested version, or run `make test` of "
            "its repository before you rely on it",
            UntestedVersionWarning,
            stacklevel=3,
        )
