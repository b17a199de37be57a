"""The settings of a sweep: which settings are tried, on which tasks, and what the best trial is best in."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shadowtune.config.checking import check_range
from shadowtune.errors import ConfigError

RATE = "optimizer.learning_rate"
DEFAULT = "default"
"""In place of a list of learning rates: five, by the kind of method (``shadowtune.config.baselines``)."""


@dataclass(frozen=True)
class SweepConfig:
    """A search for settings on validation rows, with the same number of trials for each method; test rows stay away."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of training settings, each with a list of values; every combination is a trial.
    ``optimizer.learning_rate: default`` takes five rates by the kind of method."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Grids of single methods, in place of ``grid``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Training settings of the trials alone, such as ``max_steps``."""
    select: Literal["accuracy", "loss"] = "accuracy"
    """What the best trial is best in: the accuracy on validation rows (the loss where two are equal), or the loss."""
    tasks: list[str] | None = None
    """Tasks whose validation rows decide, each counting the same; what is best there is used on every task. None
    searches on each task for that task alone."""
    extend: int = 0
    """How often, at most, the grid of a method gets a further value beyond its edge, while the best trial is there.
    The same limit for every method; needs grids of one setting with at least three ascending numbers."""
    finalists: int = 1
    """From 2 on, so many of the best settings are tried with all of ``seeds``, and the best mean wins."""
    seeds: list[int] | None = None
    """Seeds of the trials: the first for the grid, all for the finalists. None takes those of the comparison."""

    def __post_init__(self) -> None:
        """Check that grids are mappings of lists, and the ranges."""
        check_range(self, extend=(0, None), finalists=(1, None))
        faults = [f"{name} must not be empty" for name in ("tasks", "seeds") if vars(self)[name] == []]
        for place, grid in self.grids().items():
            if not isinstance(grid, Mapping):
                faults.append(f"{place} must be a mapping of dotted keys to lists, got {grid!r}")
                continue
            wrong = [key for key, values in grid.items() if not _is_list(key, values)]
            faults += [f"{place}.{key} must be a list of values, got {grid[key]!r}" for key in wrong]
            if self.extend and not wrong and not _is_ascending(grid):
                faults.append(f"extend={self.extend} needs one setting with three ascending numbers in {place}")
        if faults:
            raise ConfigError("; ".join(faults))

    def grids(self) -> dict[str, Any]:
        """Return every grid by its place in these settings."""
        return {"grid": self.grid, **{f"methods.{name}": grid for name, grid in self.methods.items()}}

    def grid_of(self, method: str, rates: Sequence[float] = ()) -> dict[str, list[Any]]:
        """Return the grid of a method; ``rates`` are its default learning rates."""
        grid = self.methods.get(method, self.grid)
        return {
            key: list(rates) if values == DEFAULT else [_number(value) for value in values]
            for key, values in grid.items()
        }

    def trials(self, method: str, rates: Sequence[float] = ()) -> list[dict[str, Any]]:
        """Return the settings of each trial of a method by dotted keys."""
        grid = self.grid_of(method, rates)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def beyond(values: Sequence[Any], steps: int) -> float:
    """Return the value that continues an ascending logarithmic grid by so many steps, downwards where negative.

    The step is the grid's mean one; the value is rounded to two digits.
    """
    numbers = [float(value) for value in values]
    ratio = (numbers[-1] / numbers[0]) ** (1 / (len(numbers) - 1))
    value = (numbers[-1] if steps > 0 else numbers[0]) * ratio**steps
    return float(f"{value:.1e}")


def _number(value: Any) -> Any:
    """Return a number that YAML 1.1 reads as text, such as 1e-3, as a number; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+e[-+]?[0-9]+", value):
        return float(value)
    return value


def _is_list(key: str, values: Any) -> bool:
    return (isinstance(values, list) and bool(values)) or (key == RATE and values == DEFAULT)


def _is_ascending(grid: Mapping[str, Any]) -> bool:
    """Whether a grid can be continued: nothing to search, or one setting with at least three ascending numbers."""
    if len(grid) != 1:
        return not grid
    (values,) = grid.values()
    if values == DEFAULT:
        return True
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return False
    ascending = all(low < high for low, high in itertools.pairwise(numbers))
    return len(numbers) >= 3 and numbers[0] > 0 and ascending and all(map(math.isfinite, numbers))
