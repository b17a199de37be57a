"""The definition of a benchmark: its settings, its candidates, its cases, and the interface of a candidate.

A benchmark compares candidates, ours first, in several cases. Each candidate has a process of its own. Samples are
taken of all candidates in turn, repeatedly, and ours is divided by each baseline's sample of the same round. A new
benchmark is a module that defines a ``Benchmark``, and a line in ``__main__.py``.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from shadowtune.config.settings import check_choices, check_range, nearest
from shadowtune.errors import ConfigError


def option(default: Any, help: str, parse: Callable[[str], Any] = str) -> Any:
    """Return a dataclass field that is also a command line option with this default, help and parser."""
    return field(default=default, metadata={"help": help, "parse": parse})


def words(text: str) -> tuple[str, ...]:
    """Split ``a,b,c`` and drop duplicates."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str) -> tuple[float, ...]:
    """Split ``1.0,0.25`` and drop duplicates."""
    return tuple(dict.fromkeys(float(word) for word in words(text)))


def integers(text: str) -> tuple[int, ...]:
    """Split ``1,8`` and drop duplicates."""
    return tuple(dict.fromkeys(int(word) for word in words(text)))


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError if a baseline is not a known one."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown baseline {name!r}{nearest(name, known)}; baselines: {', '.join(known)}")


@dataclass(frozen=True)
class Settings:
    """Settings of every benchmark; each benchmark has a subclass. They are plain values that can be pickled.

    Raises:
        ConfigError: if a value is out of its range.
    """

    repeats: int = option(5, "samples of each candidate in each case", int)
    warm_up: int = option(1, "steps before each sample that are not timed", int)
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "precision of the base: float32 or bfloat16")
    bounds: ClassVar[dict[str, tuple[float, float | None]]] = {"repeats": (1, None), "warm_up": (0, None)}
    """Smallest and largest value of each numeric setting."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that are non-empty lists of numbers of at least 1."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, **self.bounds)
        for name in self.counts:
            numbers = vars(self)[name]
            if not numbers or min(numbers) < 1:
                raise ConfigError(f"{name} must be numbers of at least 1, got {numbers}")
        check_choices(self, device=("cpu", "cuda"), dtype=("float32", "bfloat16"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no CUDA device here; pass --device cpu")


@dataclass(frozen=True)
class Case:
    """One condition under which all candidates are measured."""

    name: str
    """As in the result rows, for instance ``labelled=0.25``."""
    values: Mapping[str, Any]
    """Plain values, the argument of ``Candidate.prepare``."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """The candidates and cases of one run of a benchmark."""

    candidates: Mapping[str, Mapping[str, Any]]
    """Keyword arguments of ``Benchmark.open`` by name, ours first."""
    cases: tuple[Case, ...]
    """In the order of measurement."""


class Candidate(Protocol):
    """One measured implementation, inside a process of its own."""

    facts: Mapping[str, float | str]
    """Values of ``Benchmark.facts``, known after ``prepare``."""
    size: str | None
    """The size that was chosen for equal parameter budgets, for instance ``rank 15``; None if none was."""
    trainable_parameters: int
    """0 if it trains nothing; then it has no budget."""

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Prepare a case and warm up; return the peak memory of a step above the loaded candidate, in MB."""

    def measure(self) -> float:
        """Take one sample, in the benchmark's unit; larger is better."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    help: str
    unit: str
    """Unit of a sample, as the key of its median in the result rows: ``tokens_per_second``."""
    settings: type[Settings]
    """Settings class; its fields are made by ``option``."""
    context: tuple[str, ...]
    """Names of the settings that are columns of the result rows."""
    plan: Callable[[Any], BenchmarkPlan]
    """From settings to candidates and cases; makes all checks that are possible before anything is loaded."""
    open: Callable[..., Candidate]
    """(settings, name, **arguments of the plan) -> the loaded candidate; called in the candidate's process."""
    facts: tuple[str, ...] = ()
    """Names, with units, of further columns: ours, and the baseline's with the prefix ``baseline_``."""
    draw: Callable[[Sequence[Mapping[str, Any]], Path], None] | None = None
    """(rows, file): draw a figure of the rows; None if there is none."""
    examples: str = ""
    """Command lines for ``--help``."""
