"""Named recipes: training settings that a file takes over by ``preset: NAME``, under those that it sets itself.

A recipe says how a shadow is built and trained, for every task alike. It leaves alone what a task and its budget
decide: data, epochs, batch size, precision. Its learning rate is where a search should begin.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RECOMMENDED_SHADOW: Mapping[str, Any] = MappingProxyType(
    {
        "variant": "stateless",
        "rank": 32,
        "alpha": 0.5,
        "dropout": 0.0,
        "inject_first": True,
        "channel_scaling": True,
        "init_layers": (0,),
        "shadow_loss_weight": 1.0,
    }
)
"""What ``ShadowConfig.recommended()`` sets."""

ALONE_FIRST: Mapping[str, Any] = MappingProxyType(
    {
        "shadow": MappingProxyType({"shadow_loss_weight": 0.0}),  # so the joint stage does not run the shadow
        "shadow_epochs": 6.0,
        "shadow_learning_rate": 3e-3,
        "fit_head_mixing": "auto",
    }
)
"""What the recipe adds where the shadow can learn the rows alone first: for language models, on a task."""
RATE: Mapping[str, Any] = MappingProxyType({"learning_rate": 1e-3})
"""Where a search for the learning rate begins."""
PRESETS = ("paper", "recommended")
"""Names of the recipes."""


def recommended_shadow(values: Mapping[str, Any], whole_base: bool = True) -> dict[str, Any]:
    """Return the recipe for a shadow, without what contradicts the settings that are given.

    Args:
        values: settings of ``ShadowConfig`` that are given.
        whole_base: whether the base's weights can be copied, being neither quantized nor missing.
    """
    recipe = dict(RECOMMENDED_SHADOW)
    elsewhere = values.get("backbone", "mirror") != "mirror" or values.get("init_from") is not None
    if elsewhere or not whole_base or values.get("num_shadow_layers", 1) != 1:
        del recipe["init_layers"]
    return recipe


def preset_of(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the settings of the preset that training settings name, without what contradicts them.

    Nothing comes of a name that is not known: the reader of the settings says so.
    """
    if values.get("preset") not in PRESETS:
        return {}
    if values["preset"] == "paper":
        return {"method": "shadow"}
    given, quantization = values.get("shadow"), values.get("base_quantization")
    shadow = recommended_shadow(given if isinstance(given, Mapping) else {}, quantization in (None, "none"))
    recipe: dict[str, Any] = {"method": "shadow", "shadow": shadow, "optimizer": dict(RATE)}
    if values.get("task", "causal_lm") == "causal_lm" and values.get("stage", "task") == "task":
        shadow |= ALONE_FIRST["shadow"]
        recipe |= {key: value for key, value in ALONE_FIRST.items() if key != "shadow"}
    return recipe
