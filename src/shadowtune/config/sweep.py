"""The settings of a sweep: which settings are tried, and what the best trial is best in."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class SweepConfig:
    """A search for settings on validation rows, with the same number of trials for each method; test rows stay away."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of training settings, each with a list of values; every combination is a trial."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Grids of single methods, in place of ``grid``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Training settings of the trials alone, such as ``max_steps``."""
    select: Literal["accuracy", "loss"] = "accuracy"
    """What the best trial is best in: the accuracy on validation rows (the loss where two are equal), or the loss."""

    def __post_init__(self) -> None:
        """Check that grids are mappings of lists."""
        faults = []
        for place, grid in self.grids().items():
            if not isinstance(grid, Mapping):
                faults.append(f"{place} must be a mapping of dotted keys to lists, got {grid!r}")
                continue
            wrong = [key for key, values in grid.items() if not (isinstance(values, list) and values)]
            faults += [f"{place}.{key} must be a list of values, got {grid[key]!r}" for key in wrong]
        if faults:
            raise ConfigError("; ".join(faults))

    def grids(self) -> dict[str, Any]:
        """Return every grid by its place in these settings."""
        return {"grid": self.grid, **{f"methods.{name}": grid for name, grid in self.methods.items()}}

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return the settings of each trial of a method by dotted keys."""
        grid = self.methods.get(method, self.grid)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
