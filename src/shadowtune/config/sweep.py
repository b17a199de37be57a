"""Settings of a search in a comparison: grids of training settings, default learning rates, selection of the best."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from pydantic import StrictInt

from shadowtune.config.settings import NonNegativeInt, PositiveInt, raise_errors, settings

RATE = "optimizer.learning_rate"
DEFAULT = "default"
"""In place of a list of learning rates: ``default_rates`` of the method."""

_USUAL_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
_RATES = {"full": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], "lora-plus": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}


def default_rates(name: str) -> list[float]:
    """Return five learning rates on a logarithmic grid for a method, by its name in ``BASELINES`` or its kind."""
    return list(_RATES.get(name, _USUAL_RATES))


@settings
class SweepConfig:
    """A search for settings on validation examples, with as many trials for each method; test examples are not used."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of training settings, each with a list of values; every combination is a trial.
    ``optimizer.learning_rate: default`` means five rates by the kind of method."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Grids of single methods, in place of ``grid``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Training settings of the trials alone, such as ``max_steps``."""
    select: Literal["accuracy", "loss"] = "accuracy"
    """What selects the best trial: the accuracy on validation examples (the loss if two are equal), or the loss."""
    tasks: list[str] | None = None
    """Tasks whose validation examples decide, with equal weights; their best trial is used on every task. None searches
    on each task for that task alone."""
    extend: NonNegativeInt = 0
    """How many values at most are added to the grid of a method beyond its edge, while the best trial is there. The
    same limit for every method; needs grids of one setting with at least three ascending numbers."""
    finalists: PositiveInt = 1
    """From 2 on, so many of the best trials are repeated with all of ``seeds``, and the best mean wins."""
    seeds: list[StrictInt] | None = None
    """Seeds of the trials: the first for the grid, all for the finalists. None means those of the comparison."""

    def __post_init__(self) -> None:
        """Check that grids are mappings of lists."""
        raise_errors(self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        yield from (f"{name} must not be empty" for name in ("tasks", "seeds") if vars(self)[name] == [])
        for key, grid in self.grids().items():
            if not isinstance(grid, Mapping):
                yield f"{key} must be a mapping of dotted keys to lists, got {grid!r}"
                continue
            wrong = [setting for setting, values in grid.items() if not _is_list(setting, values)]
            yield from (f"{key}.{setting} must be a list of values, got {grid[setting]!r}" for setting in wrong)
            if self.extend and not wrong and not _is_ascending(grid):
                yield f"extend={self.extend} needs one setting with three ascending numbers in {key}"

    def grids(self) -> dict[str, Any]:
        """Return every grid by its key in these settings."""
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
    """Extrapolate an ascending logarithmic grid by a number of steps, downwards if negative, rounded to two digits.

    A step is the grid's geometric mean step.
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
    """Whether a grid can be extended: it is empty, or one setting with at least three ascending numbers."""
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
