"""Equal budgets: whoever is compared trains as many parameters as the others, within 3 %.

Counts are taken on models without weights, so even a large base is counted in a moment.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.methods import AUTO, Task, trainable_parameters

TOLERANCE = 0.03
"""Largest difference of two trainable counts, relative to ours."""


@dataclass(frozen=True)
class Growth:
    """How many parameters are trained at size n * ``step``: ``fixed`` + n * ``per_step``, n at least 1."""

    fixed: int
    per_step: int
    step: int = 1
    largest: int | None = None
    """The largest size there is."""

    def count(self, size: int) -> int:
        """Return the trainable parameters at a size."""
        return self.fixed + size // self.step * self.per_step

    def nearest(self, count: int) -> int:
        """Return the size whose count is nearest to ``count``."""
        if self.per_step == 0:  # a package that does not heed the size for this architecture
            return self.step
        size = self.step * max(1, round((count - self.fixed) / self.per_step))
        return size if self.largest is None else min(size, self.largest)


def shapeless_base(config: PreTrainedConfig, task: Task = "causal_lm") -> PreTrainedModel:
    """Build a base that has shapes but no weights, to count parameters with. Call under ``torch.device("meta")``."""
    return AUTO[task].from_config(config).requires_grad_(False)


def count_parameters(
    name: str, config: PreTrainedConfig, adapt: Callable[[PreTrainedModel], nn.Module], task: Task = "causal_lm"
) -> int:
    """Count what ``adapt`` would train on a base of this config, without making any weights.

    Args:
        name: of what is counted, for messages.
        config: of the base.
        adapt: makes the model to train of the frozen base.
        task: of the base.

    Raises:
        ShadowtuneError: if a package refuses the architecture.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages warn of when they build a model says nothing about its size
        base = shapeless_base(config, task)
        try:
            return trainable_parameters(adapt(base))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ShadowtuneError):
                raise
            reason = str(error).splitlines()[0]
            raise ShadowtuneError(f"{name} does not work on {config.model_type}: {reason}; leave it out") from None


def growth_of(count: Callable[[int], int], step: int = 1, largest: int | None = None) -> Growth:
    """Find out how trainable parameters grow with a size: linearly, so two counts tell.

    Args:
        count: from a size, a multiple of ``step``, to the parameters trained.
        step: of the sizes.
        largest: the largest size there is.
    """
    first, second = count(step), count(2 * step)
    return Growth(fixed=2 * first - second, per_step=second - first, step=step, largest=largest)


def is_equal(ours: int, peer: int, tolerance: float = TOLERANCE) -> bool:
    """Whether two trainable counts differ by no more than the tolerance."""
    return abs(peer - ours) <= tolerance * ours


def equal_sizes(
    wanted: int,
    name: str,
    ours: Growth,
    peers: Mapping[str, Growth],
    way_out: str = "choose another budget",
    tolerance: float = TOLERANCE,
) -> dict[str, int]:
    """Choose a size for ours, near ``wanted``, and one for each peer, near ours, all within the tolerance.

    A step of LoRA's rank can be worth more than 6 %; so ours moves, as little as need be, to where all peers fit.

    Args:
        wanted: trainable parameters to aim at.
        name: what ours is called.
        ours: how ours grows.
        peers: how each peer grows.
        way_out: what the user can do where there are no such sizes.
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
            f"differs by more than {tolerance:.0%}; {way_out}"
        )
    reach = int(tolerance * wanted / max(1, ours.per_step)) + 1
    candidates = [start + steps * ours.step for steps in range(-reach, reach + 1)]
    for size in sorted(candidates, key=lambda candidate: abs(ours.count(candidate) - wanted)):
        count = ours.count(size)
        chosen = {peer: growth.nearest(count) for peer, growth in peers.items()}
        exists = size >= ours.step and (ours.largest is None or size <= ours.largest)
        fits = exists and is_equal(wanted, count, tolerance)
        if fits and all(is_equal(count, growth.count(chosen[peer]), tolerance) for peer, growth in peers.items()):
            return {name: size, **chosen}
    count = ours.count(start)
    counts = {name: count, **{peer: growth.count(growth.nearest(count)) for peer, growth in peers.items()}}
    raise _unequal(name, counts, way_out, tolerance)


def check_equal(ours: str, counts: Mapping[str, int], way_out: str = "choose another budget") -> None:
    """Refuse to compare subjects whose trainable counts differ by more than 3 %.

    Args:
        ours: the name of ours.
        counts: trainable parameters by name; 0 for those that train nothing, which are left alone.
        way_out: what the user can do.

    Raises:
        ConfigError: naming the counts.
    """
    if any(count and not is_equal(counts[ours], count) for count in counts.values()):
        raise _unequal(ours, counts, way_out, TOLERANCE)


def _unequal(ours: str, counts: Mapping[str, int], way_out: str, tolerance: float) -> ConfigError:
    named = [
        f"{name} {count:,}" for name, count in counts.items() if count and not is_equal(counts[ours], count, tolerance)
    ]
    return ConfigError(
        f"budgets are not equal: {ours} has {counts[ours]:,} trainable parameters, but {', '.join(named)}; more than "
        f"{tolerance:.0%} apart, so they are not compared; {way_out}"
    )
