"""Settings of the runs and stages that a run consists of, from the settings of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import TrainConfig
from shadowtune.training.run_directory import LORA_DIRECTORY, SHADOW_DIRECTORY


def preceding_runs(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the runs that come before the run itself, each in a directory of its own, by their titles."""
    if config.method == "ensemble":
        return {"small model": small_model_settings(config), "LoRA": lora_settings(config)}
    return {"shadow-only stage": shadow_only_settings(config)} if config.has_shadow_only_stage else {}


def shadow_only_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of the run of the shadow-only stage: cross-entropy alone, a schedule of its own."""
    shadow = replace(
        config.shadow,
        shadow_loss_weight=1.0,
        shadow_loss_weight_end=None,
        distillation_weight=0.0,
        distillation_top_k=None,
        matching_weight=0.0,
    )
    optimizer = replace(config.optimizer, backbone_learning_rate=None)
    if config.shadow_learning_rate is not None:
        optimizer = replace(optimizer, learning_rate=config.shadow_learning_rate)
    return replace(
        config,
        stage="pretrain",
        shadow=shadow,
        shadow_epochs=0.0,
        distillation_epochs=0.0,
        drafting_epochs=0.0,
        fit_logit_interpolation=False,
        metric_for_best_model="loss",
        epochs=config.shadow_epochs,
        max_steps=None,
        optimizer=optimizer,
        output=str(Path(config.output) / SHADOW_DIRECTORY),
    )


def joint_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of the model in the joint stage: it starts from the shadow of the shadow-only stage."""
    start = str(Path(config.output) / SHADOW_DIRECTORY / "model")
    return replace(config, shadow=replace(config.shadow, init_layers=None, init_from=start))


def without_validation(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Return settings that evaluate nothing while training, and so compare no evaluations."""
    data = replace(config.data, validation=None)
    return replace(config, data=data, early_stopping_patience=None, load_best_model_at_end=False, **changes)


def distillation_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of the distillation stage: those of the shadow-only stage, with its own number of epochs."""
    shadow_only = shadow_only_settings(replace(config, shadow_epochs=config.distillation_epochs))
    return without_validation(shadow_only)


def draft_head_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of the draft head stage: its own number of epochs, at least one, and no evaluation."""
    return without_validation(
        config,
        epochs=max(1.0, config.drafting_epochs),
        max_steps=None,
        distillation_epochs=0.0,
        drafting_epochs=0.0,
        fit_logit_interpolation=False,
    )


def small_model_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of an ensemble's small model: a shadow-only stage."""
    rate = config.optimizer.backbone_learning_rate or config.optimizer.learning_rate
    optimizer = replace(config.optimizer, learning_rate=rate, lora_plus_ratio=None)
    return shadow_only_settings(without_validation(config, method="shadow", optimizer=optimizer))


def lora_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings of an ensemble's LoRA."""
    return without_validation(
        config,
        method="lora",
        shadow=ShadowConfig(),
        shadow_epochs=0.0,
        output=str(Path(config.output) / LORA_DIRECTORY),
    )
