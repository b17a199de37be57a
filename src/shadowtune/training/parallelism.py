"""Layouts of several processes that a run supports: what else a launcher asks for is refused before anything is loaded.

Supported are data parallelism (DDP, DeepSpeed ZeRO 1 to 3) and FSDP2, with any kind of state dict: checkpoints of DDP,
ZeRO 1 and 2 and FSDP2 are written whole (``sharding``). The others would fail after the last step, save an empty model
or train with other rates, so they are errors (docs/scaling.md).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from shadowtune.attach.sharding import loaded_in_parts
from shadowtune.config.settings import raise_errors
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, ShadowtuneError, TrainingError

EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
NO_WRAP, TRANSFORMER_WRAP = "NO_WRAP", "TRANSFORMER_BASED_WRAP"
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables by which torchrun, MPI and srun tell a process how many there are, the most specific one first."""


def check_parallelism(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Check what the launcher asks for, and that the processes that it started have found each other.

    Raises:
        ConfigError: with all settings of the launcher or of the run that are not supported, and what to set instead.
    """
    raise_errors((*_launch_errors(arguments.world_size), *_errors(config, arguments)))


def _launch_errors(found: int) -> Iterator[str]:
    asked = next((int(os.environ[name]) for name in PROCESS_COUNTS if name in os.environ), None)
    if asked is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        yield (
            "accelerate launch was asked for several processes and has started one, as it does on CPUs; use torchrun "
            "--nproc-per-node N -m shadowtune train ..., with the same environment"
        )
    elif asked is not None and asked != found:
        yield (
            f"the launcher has started {asked} processes, but {found} found each other; use torchrun --nproc-per-node "
            "N -m shadowtune train ..., on several machines with --nnodes and --rdzv-endpoint"
        )


def check_same_inputs(own: Mapping[str, Any], processes: int) -> None:
    """Compare what the processes are about to train with; every process must call it.

    Args:
        own: by a description such as "the training rows", a value or digest of this process.
        processes: their number.

    Raises:
        ConfigError: in every process, naming the first one that has something else than process 0.
    """
    if processes == 1:
        return
    first, *others = gather_object([dict(own)])
    for rank, other in enumerate(others, start=1):
        differing = [words for words in first if first[words] != other.get(words)]
        if differing:
            raise shared_error(
                ConfigError(
                    f"{' and '.join(differing)} of process {rank} differ from those of process 0; give every process "
                    "the same settings, files and package versions"
                )
            )


def is_lost_process(error: BaseException | None) -> bool:
    """Return whether an error says that another process of the launch has ended.

    NCCL has a class of its own for it; of gloo there is only the text.
    """
    closed = ("Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in closed)
    )


@contextmanager
def converted_losses(rank: int) -> Iterator[None]:
    """Context in which the end of another process becomes a TrainingError of one line.

    Args:
        rank: of this process.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ShadowtuneError) or not is_lost_process(error):
            raise
        raise TrainingError(
            f"process {rank} stops, because another process of the launch has ended; its own message says why, and "
            "--resume goes on from the last checkpoint"
        ) from error


def shared_error(error: ShadowtuneError) -> ShadowtuneError:
    """Mark an error as one that every process raises."""
    error.in_every_process = True
    return error


def _errors(config: TrainConfig, arguments: TrainingArguments) -> Iterator[str]:
    deepspeed = arguments.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        yield from _whole_model_stages(config, "DeepSpeed ZeRO stage 3")
    if deepspeed is not None and config.nonfinite_loss == "skip":
        yield "nonfinite_loss=skip reads gradients, which DeepSpeed keeps elsewhere; set nonfinite_loss=stop"
    yield from _other_dimensions()
    if not asks_for_fsdp():
        return
    if _launcher("FSDP_VERSION", "1") != "2":
        yield "FSDP version 1 joins parameters and with them their learning rates; set fsdp_version: 2"
        return
    if asks_for_sharded_loading():
        yield from _sharded_loading_errors(config)
    if config.gradient_checkpointing == "reentrant":
        yield "gradient_checkpointing=reentrant runs no hooks of FSDP2; set gradient_checkpointing=non_reentrant"
    if config.trains_deferral_head:
        yield "deferral_fraction needs the whole model in every process, which FSDP shards; set deferral_fraction=0"


def _sharded_loading_errors(config: TrainConfig) -> Iterator[str]:
    copies = os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    loaded_whole = {  # setting -> whether the run has it
        f"dp_replicate_size={copies}": copies != "1" and _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"),
        f"base_quantization={config.base_quantization}": config.base_quantization != "none",
        f"method={config.method}": config.method not in ("shadow", "lora"),
        f"distillation_cache={config.distillation_cache}": config.distillation_cache is not None,
    }
    for setting, given in loaded_whole.items():
        if given:
            yield (
                f"{setting} needs the whole base in every process when it is loaded; set "
                "fsdp_cpu_ram_efficient_loading: false"
            )


def asks_for_fsdp() -> bool:
    """Return whether the launcher asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def asks_for_sharded_loading() -> bool:
    """Return whether the launcher asks that each process reads only its part of the base."""
    return asks_for_fsdp() and _is_set(EFFICIENT_LOADING)


@contextmanager
def own_loading() -> Iterator[None]:
    """Context in which transformers and accelerate know nothing of ``fsdp_cpu_ram_efficient_loading``.

    They would load the base in the first process alone, and send it to the others: the start of a shadow reads the base
    in all of them (``attach/sharded_loading.py`` does the work).
    """
    asked = os.environ.pop(EFFICIENT_LOADING, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[EFFICIENT_LOADING] = asked


def asks_for_deepspeed() -> bool:
    """Return whether the launcher asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def asks_for_checkpointing() -> bool:
    """Return whether the launcher asks for activation checkpointing (``fsdp_activation_checkpointing``).

    FSDP's own wraps the blocks, whose hooks would run again in the backward pass. The models' own does the same work.
    """
    return asks_for_fsdp() and _is_set("FSDP_ACTIVATION_CHECKPOINTING")


def fsdp_plugin(model: Any, bf16: bool) -> FullyShardedDataParallelPlugin | None:
    """Return the layout of FSDP2 that the launcher asks for, completed for a model; None if there is none.

    A base in parts is always trained with FSDP2.

    Each block of the base and of the backbone is gathered by itself, whether or not the launcher names their classes.
    In bfloat16, gradients are averaged and losses returned in float32, which accelerate would do in bfloat16.

    Args:
        model: that will be trained; transformers' or PEFT's.
        bf16: whether blocks compute in bfloat16; parameters stay in their own precision.
    """
    in_parts = loaded_in_parts(model)
    if not asks_for_fsdp() and not in_parts:
        return None
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    policy = _launcher("FSDP_AUTO_WRAP_POLICY", NO_WRAP).upper()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2 if in_parts else None,
        auto_wrap_policy=TRANSFORMER_WRAP if policy == NO_WRAP else policy,
        mixed_precision_policy=precision,
    )
    plugin.activation_checkpointing = False
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))
    return plugin


def _launcher(name: str, default: str) -> str:
    """Return a setting of accelerate's launcher, which its processes find in their environment."""
    return os.environ.get(name, default)


def _is_set(name: str) -> bool:
    return _launcher(name, "false").lower() in ("true", "1", "yes")


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
