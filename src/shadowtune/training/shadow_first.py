"""The shadow first: before base and shadow learn a task together, the shadow learns it alone.

Alone it costs a small part of a joint step, for the base does not run. So it may see the rows several times, which a
small network needs, and the boundaries then learn beside a state that already knows the task.
"""

from dataclasses import replace
from pathlib import Path

from shadowtune.config.training import TrainConfig

DIRECTORY = "shadow"
"""Run directory of the shadow's own run, in that of the whole."""


def alone(config: TrainConfig) -> TrainConfig:
    """Return the settings of the shadow's own run: cross-entropy alone, and a learning-rate schedule of its own."""
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
        drafting_epochs=0.0,
        fit_head_mixing=False,
        epochs=config.shadow_epochs,
        max_steps=None,
        optimizer=optimizer,
        output=str(Path(config.output) / DIRECTORY),
    )


def together(config: TrainConfig) -> TrainConfig:
    """Return the settings of what follows: joint training of a shadow that starts from its own run."""
    start = str(Path(config.output) / DIRECTORY / "model")
    return replace(config, shadow=replace(config.shadow, init_layers=None, init_from=start))
