"""The settings of a run in the words of ``transformers.TrainingArguments``."""

import importlib.util
from pathlib import Path

import torch
from transformers import TrainingArguments

from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError


def training_arguments(config: TrainConfig, checkpoints: Path, quiet: bool = False) -> TrainingArguments:
    """Translate settings; in a process started by torchrun or accelerate, join the other processes.

    Args:
        config: the settings.
        checkpoints: directory that checkpoints go to.
        quiet: whether to show no progress bar.

    Raises:
        ConfigError: if the hardware or an installed package cannot do what is asked for.
    """
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard=true needs the package tensorboard: pip install 'shadowtune[tensorboard]'")
    optimizer, checkpointing = config.optimizer, config.gradient_checkpointing
    measured = config.data.validation is not None and not config.data.learn_validation
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            train_sampling_strategy="group_by_length" if config.group_by_length else "random",
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            lr_scheduler_type="constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule,
            warmup_steps=optimizer.warmup_ratio,  # below 1 it is a share of the steps
            max_grad_norm=optimizer.max_grad_norm,
            seed=config.seed,
            bf16=config.autocast,
            activation_checkpointing=checkpointing != "off",
            activation_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
            torch_compile=config.compile,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps" if config.save_steps else "epoch",
            save_steps=config.save_steps or 500,
            eval_strategy="no" if not measured else "steps" if config.eval_steps else "epoch",
            eval_steps=config.eval_steps,
            prediction_loss_only=True,
            report_to=[],
            remove_unused_columns=False,
            use_cache=True,  # False would be written into the config that is saved; objectives ask for no cache
            ddp_find_unused_parameters=True if config.projection_steps else None,  # the backbone, until it is freed
            ddp_broadcast_buffers=False,  # none changes, and a pretrained backbone's embedding is one
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=quiet,
            use_cpu=not torch.accelerator.is_available(),
        )
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device; torchrun starts a process for each
    return arguments
