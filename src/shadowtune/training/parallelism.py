"""Layouts of several processes that a run supports: what else a launcher asks for is refused before anything is loaded.

Supported are data parallelism (DDP, DeepSpeed ZeRO 1 to 3) and FSDP2 with whole state dicts. The others would fail
after the last step, save an empty model or train with other rates, so they are errors (docs/distributed.md).
"""

import os
from collections.abc import Iterator

from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import TrainingArguments

from shadowtune.config.settings import raise_errors
from shadowtune.config.training import TrainConfig


def check_parallelism(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Check what the launcher asks for.

    Raises:
        ConfigError: with all settings of the launcher or of the run that are not supported, and what to set instead.
    """
    raise_errors(_errors(config, arguments))


def _errors(config: TrainConfig, arguments: TrainingArguments) -> Iterator[str]:
    deepspeed = arguments.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        gathers = "stage3_gather_16bit_weights_on_model_save"
        if not deepspeed.deepspeed_config["zero_optimization"].get(gathers):
            yield f"without zero3_save_16bit_model: true ({gathers}), DeepSpeed ZeRO stage 3 saves no adapter; set it"
        yield from _whole_model_stages(config, "DeepSpeed ZeRO stage 3")
    yield from _other_dimensions()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        yield "FSDP version 1 joins parameters and with them their learning rates; set fsdp_version: 2"
        return
    if "SHARDED" in str(plugin.state_dict_type):
        yield "fsdp_state_dict_type SHARDED_STATE_DICT leaves no adapter that loads; set FULL_STATE_DICT"
    if plugin.activation_checkpointing:
        yield "fsdp_activation_checkpointing wraps the blocks that a shadow hooks; set gradient_checkpointing instead"
    if plugin.cpu_ram_efficient_loading:
        yield "fsdp_cpu_ram_efficient_loading cannot place a shadow's buffers; set it to false"
    yield from _whole_model_stages(config, "FSDP")


def _other_dimensions() -> Iterator[str]:
    """Dimensions of ``accelerate launch --use_parallelism_config``."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return
    for name, word in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        size = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")
        if size != "1":
            hint = (
                ", or train from Python with a base loaded with DistributedConfig(tp_size=...)" if name == "tp" else ""
            )
            yield f"{word} parallelism ({name}_size={size}) is not for shadowtune train; set it to 1{hint}"


def _whole_model_stages(config: TrainConfig, layout: str) -> Iterator[str]:
    stages = {  # setting that leaves a stage out -> whether the run has it
        "fit_logit_interpolation=false": config.fits_logit_interpolation,
        "distillation_epochs=0": config.distills_answers,
        "drafting_epochs=0": config.drafter_last,
        "deferral_fraction=0": config.trains_deferral_head,
    }
    for off, wanted in stages.items():
        if wanted:
            name = off.partition("=")[0]
            yield f"{name} needs the whole model in every process, which {layout} shards; set {off}"
