"""Parameter budgets: every method in a comparison trains as many parameters as the others, within 3 %.

Parameters are counted on models without weights (meta device), which takes no time even for a large base.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.methods import AUTO_CLASSES, Task, trainable_parameters

TOLERANCE = 0.03
"""Largest difference of two trainable counts, relative to ours."""
HINT = "choose another budget"


@dataclass(frozen=True)
class Growth:
    """Trainable parameters as a function of a size, such as a rank: ``fixed`` + n * ``per_step`` at n * ``step``."""

    fixed: int
    per_step: int
    step: int = 1
    largest: int | None = None
    """The largest possible size."""

    def count(self, size: int) -> int:
        """Return the trainable parameters at a size."""
        return self.fixed + size // self.step * self.per_step

    def nearest(self, count: int) -> int:
        """Return the size whose count is nearest to ``count``."""
        if self.per_step == 0:  # a package that ignores the size for this architecture
            return self.step
        size = self.step * max(1, round((count - self.fixed) / self.per_step))
        return size if self.largest is None else min(size, self.largest)


def shapeless_base(config: PreTrainedConfig, task: Task = "causal_lm", **kwargs: Any) -> PreTrainedModel:
    """Build a base with shapes and no weights, to count. Call under ``torch.device("meta")``.

    Args:
        config: of the base.
        task: of its head.
        **kwargs: ``dtype`` and ``attn_implementation``.
    """
    return AUTO_CLASSES[task].from_config(config, **kwargs).requires_grad_(False)


def count_parameters(
    name: str, config: PreTrainedConfig, adapt: Callable[[PreTrainedModel], nn.Module], task: Task = "causal_lm"
) -> int:
    """Count the parameters that ``adapt(base)`` trains on a base of this config, without allocating weights.

    Raises:
        ShadowtuneError: naming the method, if a package refuses the architecture.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of packages that build a model do not concern its size
        base = shapeless_base(config, task)
        try:
            return trainable_parameters(adapt(base))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ShadowtuneError):
                raise
            reason = str(error).splitlines()[0]
            raise ShadowtuneError(f"{name} does not work on {config.model_type}: {reason}; leave it out") from None


def growth_of(count: Callable[[int], int], step: int = 1, largest: int | None = None) -> Growth:
    """Return the growth of ``count(size)`` in multiples of ``step``; it is linear, so two counts determine it."""
    first, second = count(step), count(2 * step)
    return Growth(fixed=2 * first - second, per_step=second - first, step=step, largest=largest)


def is_equal(ours: int, other: int, tolerance: float = TOLERANCE) -> bool:
    """Return whether two trainable counts differ by no more than the tolerance."""
    return abs(other - ours) <= tolerance * ours


def equal_sizes(
    wanted: int,
    name: str,
    ours: Growth,
    others: Mapping[str, Growth],
    hint: str = HINT,
    tolerance: float = TOLERANCE,
) -> dict[str, int]:
    """Choose a size for our method, near ``wanted``, and one for each other, near ours, all within the tolerance.

    A step of LoRA's rank can be more than 6 % of the budget; so our size moves, as little as possible, to one that all
    others can match.

    Args:
        wanted: trainable parameters to aim at.
        name: of our method, whose growth is ``ours``.
        hint: for the message, if there are no such sizes.
        tolerance: largest difference, relative to ours.

    Returns:
        The sizes by name, ours included.

    Raises:
        ConfigError: naming the counts, if there are no such sizes.
    """
    start = ours.nearest(wanted)
    if not is_equal(wanted, ours.count(start), tolerance):
        raise ConfigError(
            f"{name} cannot have {wanted:,} trainable parameters: the nearest it comes is {ours.count(start):,}, which "
            f"differs by more than {tolerance:.0%}; {hint}"
        )
    reach = int(tolerance * wanted / max(1, ours.per_step)) + 1
    candidates = [start + steps * ours.step for steps in range(-reach, reach + 1)]
    for size in sorted(candidates, key=lambda candidate: abs(ours.count(candidate) - wanted)):
        count = ours.count(size)
        chosen = {other: growth.nearest(count) for other, growth in others.items()}
        exists = size >= ours.step and (ours.largest is None or size <= ours.largest)
        fits = exists and is_equal(wanted, count, tolerance)
        if fits and all(is_equal(count, growth.count(chosen[other]), tolerance) for other, growth in others.items()):
            return {name: size, **chosen}
    count = ours.count(start)
    counts = {name: count, **{other: growth.count(growth.nearest(count)) for other, growth in others.items()}}
    raise _unequal(name, counts, hint, tolerance)


def check_equal(ours: str, counts: Mapping[str, int], hint: str = HINT) -> None:
    """Raise ConfigError if trainable counts differ by more than 3 % from that of ``ours``; counts of 0 are exempt."""
    if any(count and not is_equal(counts[ours], count) for count in counts.values()):
        raise _unequal(ours, counts, hint, TOLERANCE)


def _unequal(ours: str, counts: Mapping[str, int], hint: str, tolerance: float) -> ConfigError:
    named = [
        f"{name} {count:,}" for name, count in counts.items() if count and not is_equal(counts[ours], count, tolerance)
    ]
    return ConfigError(
        f"budgets are not equal: {ours} has {counts[ours]:,} trainable parameters, but {', '.join(named)}; more than "
        f"{tolerance:.0%} apart, so they are not compared; {hint}"
    )
