"""Layouts of several processes that a run supports: what else a launcher asks for is refused before anything is loaded.

Supported are data parallelism (DDP, DeepSpeed ZeRO 1 and 2) and FSDP2, with any kind of state dict: checkpoints are
written whole in every layout (``sharding``). The others would fail after the last step, save an empty model or train
with other rates, so they are errors (docs/scaling.md).
"""

import os
from collections.abc import Iterator

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from shadowtune.config.settings import raise_errors
from shadowtune.config.training import TrainConfig

NO_WRAP, TRANSFORMER_WRAP = "NO_WRAP", "TRANSFORMER_BASED_WRAP"


def check_parallelism(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Check what the launcher asks for.

    Raises:
        ConfigError: with all settings of the launcher or of the run that are not supported, and what to set instead.
    """
    raise_errors(_errors(config, arguments))


def _errors(config: TrainConfig, arguments: TrainingArguments) -> Iterator[str]:
    deepspeed = arguments.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        yield (
            "DeepSpeed ZeRO stage 3 hides the weights that a shadow starts from and is checked against; use stage 2 "
            "(zero_stage: 2), or FSDP with fsdp_version: 2"
        )
    if not asks_for_fsdp():
        return
    if _launcher("FSDP_VERSION", "1") != "2":
        yield "FSDP version 1 joins parameters and with them their learning rates; set fsdp_version: 2"
        return
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        yield (
            "fsdp_cpu_ram_efficient_loading loads the base in one process alone, but every process starts its shadow "
            "from it; set it to false"
        )
    if config.gradient_checkpointing == "reentrant":
        yield "gradient_checkpointing=reentrant runs no hooks of FSDP2; set gradient_checkpointing=non_reentrant"


def asks_for_fsdp() -> bool:
    """Return whether the launcher asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def asks_for_checkpointing() -> bool:
    """Return whether the launcher asks for activation checkpointing (``fsdp_activation_checkpointing``).

    FSDP's own wraps the blocks, whose hooks would run again in the backward pass. The models' own does the same work.
    """
    return asks_for_fsdp() and _is_set("FSDP_ACTIVATION_CHECKPOINTING")


def fsdp_plugin(model: nn.Module, bf16: bool) -> FullyShardedDataParallelPlugin | None:
    """Return the layout of FSDP2 that the launcher asks for, completed for a model; None if it asks for none.

    Each block of the base and of the backbone is gathered by itself, whether or not the launcher names their classes.
    In bfloat16, gradients are averaged and losses returned in float32, which accelerate would do in bfloat16.

    Args:
        model: that will be trained.
        bf16: whether blocks compute in bfloat16; parameters stay in their own precision.
    """
    if not asks_for_fsdp():
        return None
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    policy = _launcher("FSDP_AUTO_WRAP_POLICY", NO_WRAP).upper()
    plugin = FullyShardedDataParallelPlugin(
        auto_wrap_policy=TRANSFORMER_WRAP if policy == NO_WRAP else policy, mixed_precision_policy=precision
    )
    plugin.activation_checkpointing = False
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))
    return plugin


def _launcher(name: str, default: str) -> str:
    """Return what accelerate's launcher has set; it speaks to its processes through their environment."""
    return os.environ.get(name, default)


def _is_set(name: str) -> bool:
    return _launcher(name, "false").lower() in ("true", "1", "yes")
