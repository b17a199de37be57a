"""The layouts of several processes and what each of them can do: `LAYOUTS` and `CELLS` are the rows and columns."""

from dataclasses import dataclass, field
from typing import Any

from shadowtune import ShadowConfig
from shadowtune.config.training import LoraConfig, OptimizerConfig

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
TENSOR_PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}


@dataclass(frozen=True)
class Layout:
    """A layout by the environment that a launcher sets, and the package that it needs."""

    environment: dict[str, str] = field(default_factory=dict)
    needs: str = "torch"


LAYOUTS = {
    "DDP": Layout(),
    "FSDP2, full state dict": Layout({**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "FSDP2, sharded state dict": Layout({**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "FSDP2, sharded loading": Layout({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}),
    "ZeRO 2": Layout({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "deepspeed"),
    "ZeRO 3": Layout({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "deepspeed"),
    "TP": Layout(TENSOR_PARALLEL),
}

SHADOW = ShadowConfig(rank=4, update_width=3, dropout=0.0)
STATELESS = ShadowConfig(rank=4, variant="stateless", dropout=0.0, shadow_loss_weight=0.0)
DRAFTING = ShadowConfig(rank=4, update_width=3, dropout=0.0, draft_rank=2)

BEST = "best checkpoint"
"""A column whose validation loss rises, so that the weights that are kept are not the last ones."""

CELLS: dict[str, dict[str, Any]] = {  # column -> settings of its run that differ from the first one's
    "train": {},
    "shadow-only stage": {"shadow_epochs": 1.0},
    "distillation": {"shadow": STATELESS, "distillation_epochs": 1.0},
    "drafter": {"shadow": DRAFTING, "drafting_epochs": 1.0},
    "interpolation": {"fit_logit_interpolation": True},
    "checkpointing": {"gradient_checkpointing": "non_reentrant"},
    "nf4": {"base_quantization": "nf4"},
    "lora": {"method": "lora", "shadow": ShadowConfig(), "lora": LoraConfig(rank=4, dropout=0.0)},
    BEST: {"optimizer": OptimizerConfig(learning_rate=3e-2, schedule="constant")},
    "full": {"method": "full", "shadow": ShadowConfig()},
}
CHECKS = ("kill, resume", "resume from DDP", "save", "reload")
"""Columns about the checkpoints of the first run, and its saved model."""
