"""Equal budgets in a comparison: the size of each method that gives it as many trainable parameters as the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from shadowtune.config.comparison import BudgetConfig, CompareConfig
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError
from shadowtune.model.budget import Growth, count_parameters, equal_sizes, growth_of
from shadowtune.model.methods import load_base_config, make_trainable

MLP_KEYS = ("shadow.intermediate_size", "peft.shadow_intermediate_size")
"""Sizes of a mirrored block's MLP, which go in steps of 8."""
WAY_OUT = "change budget, or let another size of the method be chosen (methods.NAME.size)"


@dataclass(frozen=True)
class Size:
    """What the budget chose for a method on a task."""

    parameters: int
    """Trainable ones, counted."""
    changes: dict[str, Any]
    """By dotted keys; empty where nothing was to choose."""

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.changes.items())


class ParameterCounter:
    """Counts the parameters that runs would train, without making any weights; equal models are counted once."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def count(self, name: str, config: TrainConfig) -> int:
        """Return the trainable parameters of a run.

        Args:
            name: of the method, for messages.
            config: settings of the run.

        Raises:
            ShadowtuneError: if the base is missing, or the method refuses it.
        """
        # Where a shadow's values come from changes no shape, and there is nothing here to take them from.
        shadow = replace(config.shadow, init_layers=None, init_from=None)
        parts = (config.model, config.method, config.task, config.num_labels, config.lora, shadow, config.peft)
        key = repr(parts)
        if key not in self._counts:
            self._counts[key] = count_parameters(
                name,
                base_config(config),
                lambda base: make_trainable(base, config.method, config.task, shadow, config.lora, peft=config.peft),
                config.task,
            )
        return self._counts[key]


def base_config(config: TrainConfig) -> PreTrainedConfig:
    """Read the config of a run's base; raises CheckpointError if there is none."""
    base = load_base_config(config.model)
    if config.num_labels is not None:
        base.num_labels = config.num_labels
    return base


def solve_sizes(config: CompareConfig, task: str, counter: ParameterCounter) -> dict[str, Size]:
    """Choose the size of each method on a task, and count what it trains.

    Args:
        config: the comparison.
        task: one of its tasks; tasks may have different bases.
        counter: counts, over all tasks.

    Raises:
        ConfigError: if there are no sizes that make the budgets equal.
        ShadowtuneError: if a base is missing, or a method refuses it.
    """
    settings = {name: config.train_config(task, name) for name in config.methods if config.kind(name) != "base"}

    def count(method: str, changes: Mapping[str, Any]) -> int:
        return counter.count(method, config.train_config(task, method, changes))

    chosen: dict[str, dict[str, Any]] = {name: {} for name in settings}
    if config.budget is not None:
        keys = {name: key for name in settings if (key := config.size_key(name)) is not None}
        growths = {name: _growth(key, settings[name], partial(count, name)) for name, key in keys.items()}
        wanted, ours = _aim(config.budget, growths, count)
        peers = {name: growth for name, growth in growths.items() if name != ours}
        sizes = equal_sizes(wanted, ours, growths[ours], peers, WAY_OUT, config.budget.tolerance)
        chosen |= {name: _changes(keys[name], size, settings[name]) for name, size in sizes.items()}
    found = {name: Size(count(name, changes), changes) for name, changes in chosen.items()}
    return found | {name: Size(0, {}) for name in config.methods if config.kind(name) == "base"}


def _growth(key: str, config: TrainConfig, count: Callable[[Mapping[str, Any]], int]) -> Growth:
    """Find out how a method grows. A mirror that copies blocks of the base cannot be wider than they are."""
    copies = config.method == "shadow" and config.shadow.init_layers is not None and key == MLP_KEYS[0]
    largest = base_config(config).get_text_config(decoder=True).intermediate_size if copies else None
    growth = growth_of(lambda size: count(_changes(key, size, config)), 8 if key in MLP_KEYS else 1, largest)
    if growth.per_step <= 0:
        raise ConfigError(f"{key} does not change how many parameters {config.method} trains; {WAY_OUT}")
    return growth


def _aim(
    budget: BudgetConfig, growths: Mapping[str, Growth], count: Callable[[str, Mapping[str, Any]], int]
) -> tuple[int, str]:
    """Return the parameters to aim at, and the method that moves to where all others fit: the one that can finely."""
    if budget.like is not None:
        if budget.like not in growths:
            raise ConfigError(f"budget.like: {budget.like} has no size to choose; name another method")
        return count(budget.like, {}), budget.like
    if not growths:
        raise ConfigError("budget: no method has a size to choose; leave budget out")
    assert budget.parameters is not None
    return budget.parameters, min(growths, key=lambda name: growths[name].per_step)


def _changes(key: str, size: int, config: TrainConfig) -> dict[str, Any]:
    """Put a size into settings; LoRA's scale, alpha / rank, stays what it is."""
    if key == "lora.rank":
        return {key: size, "lora.alpha": size * config.lora.alpha / config.lora.rank}
    return {key: size}
