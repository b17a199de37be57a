"""Equal budgets: every subject trains as many parameters as ours, within 3 %."""

from collections.abc import Mapping
from dataclasses import dataclass

from shadowtune.errors import ConfigError

TOLERANCE = 0.03
"""Largest difference of two trainable counts, relative to ours."""


@dataclass(frozen=True)
class Growth:
    """How many parameters are trained at size n * ``step``: ``fixed`` + n * ``per_step``, n at least 1."""

    fixed: int
    per_step: int
    step: int = 1

    def count(self, size: int) -> int:
        """Return the trainable parameters at a size."""
        return self.fixed + size // self.step * self.per_step

    def nearest(self, count: int) -> int:
        """Return the size whose count is nearest to ``count``."""
        if self.per_step == 0:  # a package that does not heed the size for this architecture
            return self.step
        return self.step * max(1, round((count - self.fixed) / self.per_step))


def is_equal(ours: int, peer: int) -> bool:
    """Whether two trainable counts differ by no more than the tolerance."""
    return abs(peer - ours) <= TOLERANCE * ours


def equal_sizes(wanted: int, name: str, ours: Growth, peers: Mapping[str, Growth]) -> dict[str, int]:
    """Choose a size for ours, within 3 % of ``wanted``, and one for each peer, within 3 % of ours.

    A step of LoRA's rank can be worth more than 6 %; so ours moves, as little as need be, to where all peers fit.

    Args:
        wanted: trainable parameters to aim at.
        name: what ours is called.

    Returns:
        The sizes by name, ours included.

    Raises:
        ConfigError: naming the counts, if there are no such sizes.
    """
    start = ours.nearest(wanted)
    if not is_equal(wanted, ours.count(start)):
        raise ConfigError(
            f"{name} cannot have {wanted:,} trainable parameters: the nearest it comes is {ours.count(start):,}, which "
            f"differs by more than {TOLERANCE:.0%}; pass another --parameters"
        )
    reach = int(TOLERANCE * wanted / max(1, ours.per_step)) + 1
    candidates = [start + steps * ours.step for steps in range(-reach, reach + 1)]
    for size in sorted(candidates, key=lambda candidate: abs(ours.count(candidate) - wanted)):
        count = ours.count(size)
        chosen = {peer: growth.nearest(count) for peer, growth in peers.items()}
        fits = size >= ours.step and is_equal(wanted, count)
        if fits and all(is_equal(count, growth.count(chosen[peer])) for peer, growth in peers.items()):
            return {name: size, **chosen}
    count = ours.count(start)
    counts = {name: count, **{peer: growth.count(growth.nearest(count)) for peer, growth in peers.items()}}
    raise _unequal(name, counts)


def check_equal(ours: str, counts: Mapping[str, int]) -> None:
    """Refuse to compare subjects whose trainable counts differ by more than 3 %.

    Args:
        ours: the name of ours.
        counts: trainable parameters by name; 0 for those that train nothing, which are left alone.

    Raises:
        ConfigError: naming the counts.
    """
    if any(count and not is_equal(counts[ours], count) for count in counts.values()):
        raise _unequal(ours, counts)


def _unequal(ours: str, counts: Mapping[str, int]) -> ConfigError:
    named = [f"{name} {count:,}" for name, count in counts.items() if count and not is_equal(counts[ours], count)]
    return ConfigError(
        f"budgets are not equal: {ours} has {counts[ours]:,} trainable parameters, but {', '.join(named)}; more than "
        f"{TOLERANCE:.0%} apart, so they are not compared; pass another --parameters or leave the peer out of --peers"
    )
