"""Equal parameter budgets: the size of each method with which it trains as many parameters as the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.config.comparison import BudgetConfig, CompareConfig
from shadowtune.config.data import DataConfig
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, ShadowtuneError
from shadowtune.model.budget import Growth, count_parameters, equal_sizes, growth_of, is_equal
from shadowtune.model.methods import load_base_config, make_trainable
from shadowtune.training.stages import prepare_shadow_only

MLP_KEYS = ("shadow.intermediate_size", "peft.shadow_intermediate_size")
"""MLP widths of a shadow block, which are multiples of 8."""
NO_VALIDATION = DataConfig(train="none")
"""Data settings of a count, which reads no data."""
HINT = "change budget, or let another size of the method be chosen (methods.NAME.size)"


@dataclass(frozen=True)
class Size:
    """The size of a method on a task."""

    parameters: int
    """Number of trainable parameters."""
    changes: dict[str, Any]
    """Chosen settings by dotted keys; empty if there was nothing to choose."""
    refused: str | None = None
    """Why the method cannot be compared on the task; None if it can."""

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.changes.items())


class ParameterCounter:
    """Counts the trainable parameters of runs without allocating weights; equal models are counted once."""

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
        if config.method == "ensemble":  # two models, trained one after the other
            small = replace(config, method="shadow", stage="pretrain", shadow_epochs=0.0, data=NO_VALIDATION)
            lora = replace(config, method="lora", shadow_epochs=0.0, data=NO_VALIDATION)
            return self.count(name, lora) + self.count(name, small)
        # The source of a shadow's initial values changes no shape, and there are no values here to copy.
        shadow = replace(config.shadow, init_layers=None, init_from=None)
        kind = (config.model, config.method, config.stage, config.task, config.num_labels)
        parts = (*kind, config.lora, shadow, config.peft)
        key = repr(parts)
        if key not in self._counts:
            self._counts[key] = count_parameters(
                name,
                base_config(config),
                lambda base: _adapted(base, config, shadow),
                config.task,
            )
        return self._counts[key]


def _adapted(base: PreTrainedModel, config: TrainConfig, shadow: ShadowConfig) -> nn.Module:
    model = make_trainable(base, config.method, config.task, shadow, config.lora, peft=config.peft)
    return prepare_shadow_only(model) if config.stage == "pretrain" else model


def base_config(config: TrainConfig) -> PreTrainedConfig:
    """Read the config of a run's base; raises CheckpointError if there is none."""
    base = load_base_config(config.model)
    if config.num_labels is not None:
        base.num_labels = config.num_labels
    return base


def solve_sizes(config: CompareConfig, task: str, counter: ParameterCounter) -> dict[str, Size]:
    """Choose the size of each method on a task, and count its trainable parameters.

    A method is refused, with the reason, if its package is missing, it does not support the base or has no size within
    the budget. The others are compared without it.

    Args:
        config: the comparison.
        task: one of its tasks; tasks may have different bases.
        counter: shared by all tasks.

    Raises:
        ConfigError: if the budget itself cannot be met, or settings are wrong.
        CheckpointError: if a base is missing.
    """
    trained = [name for name in config.methods if config.kind(name) != "base"]
    settings = {name: config.train_config(task, name) for name in trained}

    def count(method: str, changes: Mapping[str, Any]) -> int:
        return counter.count(method, config.train_config(task, method, changes))

    refused: dict[str, str] = {}
    for name in trained:
        try:
            count(name, {})
        except (ConfigError, CheckpointError):
            raise
        except ShadowtuneError as error:
            refused[name] = str(error)
    able = [name for name in trained if name not in refused]
    chosen: dict[str, dict[str, Any]] = {name: {} for name in able}
    if config.budget is not None and config.budget.equal_parameters:
        keys = {name: key for name in able if (key := config.size_key(name)) is not None}
        growths = {name: growth_in(key, settings[name], partial(count, name)) for name, key in keys.items()}
        sizes, unequal = _equal_sizes(config.budget, growths, count, refused)
        refused |= unequal
        chosen |= {name: changes_for(keys[name], size, settings[name]) for name, size in sizes.items()}
    found = {}
    for name, changes in chosen.items():
        try:
            found[name] = Size(count(name, changes), changes, refused.get(name))
        except (ConfigError, CheckpointError):
            raise
        except ShadowtuneError as error:  # the method does not support this size
            refused[name] = str(error)
    found |= {name: Size(0, {}, reason) for name, reason in refused.items() if name not in found}
    return found | {name: Size(0, {}) for name in config.methods if config.kind(name) == "base"}


def _equal_sizes(
    budget: BudgetConfig,
    growths: Mapping[str, Growth],
    count: Callable[[str, Mapping[str, Any]], int],
    refused: Mapping[str, str],
) -> tuple[dict[str, int], dict[str, str]]:
    """Choose the sizes of all methods that can be made equal; also return the reasons of the others, by name."""
    if budget.like is not None and budget.like in refused:
        raise ConfigError(f"budget.like: {budget.like} cannot be compared: {refused[budget.like]}")
    wanted, ours = _aim(budget, growths, count)
    baselines = {name: growth for name, growth in growths.items() if name != ours}
    left_out: dict[str, str] = {}
    while True:
        try:
            return equal_sizes(wanted, ours, growths[ours], baselines, HINT, budget.tolerance), left_out
        except ConfigError as error:
            if not baselines or not is_equal(
                wanted, growths[ours].count(growths[ours].nearest(wanted)), budget.tolerance
            ):
                raise
            worst = max(baselines, key=lambda name: _distance(baselines[name], wanted))
            left_out[worst] = str(error)
            del baselines[worst]


def _distance(growth: Growth, wanted: int) -> int:
    """Difference between the wanted parameters and those of a method's nearest size."""
    return abs(growth.count(growth.nearest(wanted)) - wanted)


def growth_in(key: str, config: TrainConfig, count: Callable[[Mapping[str, Any]], int]) -> Growth:
    """Return how a method's parameters grow with its size. A shadow that copies base blocks is at most as wide."""
    copies = config.method == "shadow" and config.shadow.init_layers is not None and key == MLP_KEYS[0]
    largest = base_config(config).get_text_config(decoder=True).intermediate_size if copies else None
    growth = growth_of(lambda size: count(changes_for(key, size, config)), 8 if key in MLP_KEYS else 1, largest)
    if growth.per_step <= 0:
        raise ConfigError(f"{key} does not change how many parameters {config.method} trains; {HINT}")
    return growth


def _aim(
    budget: BudgetConfig, growths: Mapping[str, Growth], count: Callable[[str, Mapping[str, Any]], int]
) -> tuple[int, str]:
    """Return the wanted parameters, and the method that is fitted to the others: the one with the finest steps."""
    if budget.like is not None:
        if budget.like not in growths:
            raise ConfigError(f"budget.like: {budget.like} has no size to choose; name another method")
        return count(budget.like, {}), budget.like
    if not growths:
        raise ConfigError("budget: no method has a size to choose; leave budget out")
    assert budget.parameters is not None
    return budget.parameters, min(growths, key=lambda name: growths[name].per_step)


def changes_for(key: str, size: int, config: TrainConfig) -> dict[str, Any]:
    """Put a size into settings; LoRA's scale, alpha / rank, stays what it is."""
    if key == "lora.rank":
        return {key: size, "lora.alpha": size * config.lora.alpha / config.lora.rank}
    return {key: size}
