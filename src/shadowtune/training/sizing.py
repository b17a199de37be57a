"""The rule by which ``--budget`` and ``--minutes`` set rank, backbone and passes (docs/planning.md).

Budget: the boundaries get a quarter of the trained parameters, the backbone the rest. Time: the shadow-only stage makes
three passes for each pass of the joint stage, as in the recommended recipe.
"""

from dataclasses import replace
from typing import Any

from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError
from shadowtune.model.backbone import sizes_of
from shadowtune.model.budget import TOLERANCE, growth_of
from shadowtune.tables import duration
from shadowtune.training.planning import Lengths, Planner

BOUNDARY_SHARE = 0.25
"""Fraction of the budget for the boundaries."""
LOWEST_RANK, HIGHEST_RANK = 4, 256
DIVISORS = (1, 2, 4, 8)
"""The backbone's width and heads are the base's over one of these."""
LEAST_MLP = 0.25
"""Least MLP width of the backbone, of the base's over the divisor."""
USED_TIME = 0.9
"""Fraction of the minutes for training; the rest loads and saves."""
SHADOW_PASSES = 3.0
"""Passes of the shadow-only stage for each of the joint stage."""
FEWEST_PASSES, MOST_PASSES = 0.25, 4.0


def fit_budget(config: TrainConfig, parameters: int, planner: Planner) -> TrainConfig:
    """Set the rank and the backbone's sizes such that a run trains at most ``parameters``, and 97 % of them at least.

    Args:
        config: of the preset "recommended", for the method shadow.
        parameters: the budget.
        planner: counts.

    Raises:
        ConfigError: if the run is another one, or the budget is too small or too large for its base.
    """
    if (config.preset, config.method, config.stage) != ("recommended", "shadow", "task"):
        raise ConfigError("--budget sizes a run of preset: recommended with method: shadow; set them, or leave it out")
    if config.shadow.backbone != "mirror" or config.shadow.init_from is not None:
        raise ConfigError("--budget builds the backbone, which shadow.backbone or shadow.init_from has already chosen")

    def sized(**changes: Any) -> TrainConfig:
        return replace(config, shadow=replace(config.shadow, **changes))

    def count(**changes: Any) -> int:
        return planner.trained_parameters(sized(**changes))

    per_rank = count(rank=2) - count(rank=1)
    rank = min(HIGHEST_RANK, max(LOWEST_RANK, int(BOUNDARY_SHARE * parameters / per_rank)))
    smallest, chosen = 0, None
    for divisor in DIVISORS:
        shape = _divided(planner, config, divisor)
        if shape is None:
            continue
        widest = int(shape.pop("intermediate_size")) // 8 * 8

        def with_mlp(units: int, shape: dict[str, Any] = shape) -> int:
            return count(rank=rank, intermediate_size=units, **shape)

        growth = growth_of(with_mlp, 8, widest)
        smallest = growth.count(max(8, int(LEAST_MLP * widest) // 8 * 8))
        if smallest <= parameters:
            units = min(widest, 8 * ((parameters - growth.fixed) // growth.per_step))
            chosen = {**shape, "intermediate_size": units}
            break
    if chosen is None:
        raise ConfigError(
            f"--budget {parameters:,} is too small for {config.model}: the smallest shadow of the rule trains "
            f"{smallest:,} parameters"
        )
    spare = (parameters - count(rank=rank, **chosen)) // per_rank
    rank = min(HIGHEST_RANK, rank + spare)
    found = count(rank=rank, **chosen)
    if found < (1 - TOLERANCE) * parameters:
        raise ConfigError(
            f"--budget {parameters:,} is more than the rule can use on {config.model}: its largest shadow trains "
            f"{found:,} parameters; for more set shadow.num_shadow_layers"
        )
    return sized(rank=rank, **chosen)


def _divided(planner: Planner, config: TrainConfig, divisor: int) -> dict[str, int] | None:
    """Return the sizes of a backbone that is narrower than the base by a divisor; None if its heads do not allow it."""
    sizes = sizes_of(planner.base_config(config).get_text_config(decoder=True))
    width, heads, units = (sizes[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
    assert width is not None and heads is not None and units is not None
    if divisor == 1:
        return {"intermediate_size": units}
    if width % divisor or heads % divisor:
        return None
    shape = {"hidden_size": width // divisor, "num_attention_heads": heads // divisor}
    keys = sizes["num_key_value_heads"]
    if keys is not None:
        shape["num_key_value_heads"] = keys = max(1, keys // divisor)
        if shape["num_attention_heads"] % keys:
            return None
    return {**shape, "intermediate_size": units // divisor}


def fit_minutes(config: TrainConfig, minutes: float, lengths: Lengths, planner: Planner) -> TrainConfig:
    """Set the passes over the data such that training takes the given minutes, by the planner's clock.

    Raises:
        ConfigError: if not even a quarter of a pass is possible.
    """
    ratio = SHADOW_PASSES if config.has_shadow_only_stage else 0.0
    one = replace(config, epochs=1.0, shadow_epochs=ratio, max_steps=None)
    seconds = planner.seconds(one, lengths)
    assert seconds is not None  # the lengths are those of data
    passes = min(MOST_PASSES, USED_TIME * 60 * minutes / seconds)
    if passes < FEWEST_PASSES:
        least = FEWEST_PASSES * seconds / USED_TIME
        raise ConfigError(
            f"--minutes {minutes:g} is too short: {FEWEST_PASSES:g} of a pass over {lengths.rows:,} examples takes "
            f"about {duration(least)} on this machine; set data.limit, or give more minutes"
        )
    passes = int(100 * passes) / 100
    return replace(one, epochs=passes, shadow_epochs=ratio * passes)
