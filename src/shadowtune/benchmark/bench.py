"""What a benchmark is. A new one is a file that defines a ``Bench``, and a line in ``registry.py``.

A benchmark compares subjects, ours first, in several cases. Each subject lives in a process of its own; one sample is
taken of each in turn, again and again, and ours is divided by each peer's sample of the same round.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from shadowtune.config.checking import check_choices, check_range, nearest
from shadowtune.errors import ConfigError


def option(default: Any, help: str, parse: Callable[[str], Any] = str) -> Any:
    """Return a dataclass field that is an option of the command line too: its default, help and parser of text."""
    return field(default=default, metadata={"help": help, "parse": parse})


def words(text: str) -> tuple[str, ...]:
    """Split ``a,b,c``; a word that comes twice counts once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str) -> tuple[float, ...]:
    """Split ``1.0,0.25``; a number that comes twice counts once."""
    return tuple(dict.fromkeys(float(word) for word in words(text)))


def integers(text: str) -> tuple[int, ...]:
    """Split ``1,8``; a number that comes twice counts once."""
    return tuple(dict.fromkeys(int(word) for word in words(text)))


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError if a peer is none of those that are known."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown peer {name!r}{nearest(name, known)}; peers: {', '.join(known)}")


@dataclass(frozen=True)
class Settings:
    """What every benchmark can be told. The settings of one are a subclass; they are plain values, ready for JSON.

    Raises:
        ConfigError: if a value is out of its range.
    """

    repeats: int = option(5, "samples of each subject in each case", int)
    warm_up: int = option(1, "steps before each sample that are not timed", int)
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "precision of the base: float32 or bfloat16")
    bounds: ClassVar[dict[str, tuple[float, float | None]]] = {"repeats": (1, None), "warm_up": (0, None)}
    """Smallest and largest value of each numeric setting."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that are lists of numbers of at least 1, of which there must be one."""

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
    """One condition under which all subjects are measured."""

    name: str
    """As in the rows, for instance ``labelled=0.25``."""
    values: Mapping[str, Any]
    """Plain values for ``Subject.prepare``."""


@dataclass(frozen=True)
class Plan:
    """Who is measured, and in which cases."""

    subjects: Mapping[str, Mapping[str, Any]]
    """By name, ours first: the keyword arguments of ``Bench.open``."""
    cases: tuple[Case, ...]
    """In the order in which they are measured."""


class Subject(Protocol):
    """One thing that is measured, inside a process of its own."""

    facts: Mapping[str, float | str]
    """What ``Bench.facts`` names, known once it is prepared."""
    size: str | None
    """What was chosen so that the budgets are equal, for instance ``rank 15``; None if nothing was."""
    trainable_parameters: int
    """How many parameters it trains; 0 if it trains nothing, and then it has no budget."""

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make ready for a case and warm up; return the peak memory of a step above the loaded subject, in MB."""

    def measure(self) -> float:
        """Take one sample, in the benchmark's unit; the larger the better."""


@dataclass(frozen=True)
class Bench:
    """One benchmark."""

    name: str
    help: str
    unit: str
    """What a sample is, as the key of its median in the rows: ``tokens_per_second``."""
    settings: type[Settings]
    """Its settings, whose fields are made by ``option``."""
    context: tuple[str, ...]
    """Names of the settings that stand in each row."""
    plan: Callable[[Any], Plan]
    """Settings -> who is measured in which cases; checks all that can be checked before anything is loaded."""
    open: Callable[..., Subject]
    """(settings, name, **arguments of the plan) -> the subject, loaded; called in the subject's own process."""
    facts: tuple[str, ...] = ()
    """Names, with units, of what else the rows say of ours and, behind ``peer_``, of the peer."""
    draw: Callable[[Sequence[Mapping[str, Any]], Path], None] | None = None
    """(rows, file) -> a picture of them; None if a table says enough."""
    examples: str = ""
    """Command lines for ``--help``."""
