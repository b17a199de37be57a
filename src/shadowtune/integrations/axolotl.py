"""Plugin of Axolotl: trains a shadow as ``adapter: shadowtune``, by the recommended stages.

    plugins: [shadowtune.integrations.axolotl.ShadowtunePlugin]
    adapter: shadowtune
    shadowtune: {r: 16, shadow_epochs: 6}

Axolotl loads the base, the data and the trainer; the plugin makes the adapter, trains the shadow by itself before
Axolotl's own training, which then trains the boundaries, and fits the weight of the shadow's logits after it.
"""

import contextlib
import dataclasses
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from shadowtune.config.settings import raise_errors, unknown_keys
from shadowtune.config.training import SHADOW_STAGE
from shadowtune.errors import ConfigError
from shadowtune.peft import ShadowtuneConfig
from shadowtune.training.stages import recommended_stages

ADAPTER = "shadowtune"
"""Value of ``adapter`` in Axolotl's settings, and name of the block with ours."""


@dataclasses.dataclass
class StageOptions:
    """Keys of the block beside the fields of ``ShadowtuneConfig``."""

    shadow_epochs: float = SHADOW_STAGE["shadow_epochs"]
    """Epochs in which the shadow learns by itself, before Axolotl's own; 0 leaves them out: the joint loss alone."""
    shadow_learning_rate: float = SHADOW_STAGE["shadow_learning_rate"]
    """Their peak learning rate."""


class ShadowtuneArgs(BaseModel):
    """The block ``shadowtune`` in Axolotl's settings."""

    shadowtune: dict[str, Any] | None = None


def read_options(cfg: Any) -> tuple[ShadowtuneConfig, StageOptions]:
    """Return the settings of shadow and stages.

    Args:
        cfg: Axolotl's settings.

    Raises:
        ConfigError: with every key that does not exist, or a value out of its range.
    """
    given = dict(cfg.get(ADAPTER) or {})
    names = {field.name for field in dataclasses.fields(StageOptions)}
    stages = {name: given.pop(name) for name in names & given.keys()}
    raise_errors(unknown_keys(ShadowtuneConfig, given, ADAPTER))
    return ShadowtuneConfig(**given), StageOptions(**stages)


class ShadowtunePlugin(BasePlugin):
    """The plugin; Axolotl makes one for a process."""

    def __init__(self) -> None:
        super().__init__()
        self._stages = contextlib.ExitStack()

    def get_input_args(self) -> str:
        """Name the class of the settings that the plugin adds."""
        return f"{ShadowtuneArgs.__module__}.{ShadowtuneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """Declare the adapter, which Axolotl then accepts in its settings."""
        return [AdapterCapabilities(name=ADAPTER)]

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse settings that a shadow does not support, before anything is loaded.

        Raises:
            ConfigError: naming the setting and what to write.
        """
        if cfg.get("adapter") != ADAPTER:
            return
        read_options(cfg)
        if cfg.get("sample_packing"):
            raise ConfigError("sample_packing is not supported with adapter: shadowtune; set sample_packing: false")
        if cfg.get("fsdp_config") or cfg.get("deepspeed"):
            raise ConfigError(
                "adapter: shadowtune trains with DDP in Axolotl; leave fsdp_config and deepspeed out, or use "
                "shadowtune train (docs/scaling.md)"
            )

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, ShadowtuneConfig] | None:
        """Return the base with a new shadow, or one of ``lora_model_dir``; None for other adapters.

        Args:
            model: the base.
            cfg: Axolotl's settings.
            inference: whether a loaded shadow stays frozen.
            config_only: return the settings alone, for trainers that make the adapter themselves (DPO, KTO).
        """
        if cfg.get("adapter") != ADAPTER:
            return None
        config, _ = read_options(cfg)
        if config_only:
            return None, config
        if directory := cfg.get("lora_model_dir"):
            return PeftModel.from_pretrained(model, directory, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Train the shadow by itself; a resumed run has done so before its first checkpoint."""
        if cfg.get("adapter") != ADAPTER or cfg.get("rl"):
            return
        _, options = read_options(cfg)
        self._stages.enter_context(
            recommended_stages(
                trainer,
                options.shadow_epochs,
                options.shadow_learning_rate,
                resumed=bool(cfg.get("resume_from_checkpoint")),
            )
        )

    def post_train(self, cfg: Any, model: Any) -> None:
        """Fit the weight of the shadow's logits, if there are evaluation examples; Axolotl then saves the adapter."""
        self._stages.close()
