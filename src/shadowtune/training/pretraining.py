"""Training a shadow before any task: its backbone and projections learn language, its boundaries wait for the task."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowtune.errors import ConfigError
from shadowtune.model.pair import ShadowPair


def set_up_pretraining(model: nn.Module, projection_steps: int = 0) -> ShadowPair:
    """Let a pair compute the detached shadow and keep its boundaries as they are.

    Boundaries that start with W_up = 0 make the attached model equal its base before pretraining and after it.

    Raises:
        ConfigError: if the projections are to be trained first and there are none.
    """
    assert isinstance(model, ShadowPair)
    if projection_steps and not isinstance(model.shadow.projection, nn.Linear):
        raise ConfigError(
            f"projection_steps={projection_steps} trains the shadow's projections first, but it has none, because its "
            "hidden_size is the base's; set projection_steps=0, or another shadow.hidden_size"
        )
    model.shadow.boundaries.requires_grad_(False)
    return model.set_mode("detached")


class ProjectionsFirst(TrainerCallback):
    """Freezes the shadow's backbone during the first steps, those before a resumption counted.

    Args:
        model: in stage "pretrain".
        steps: optimizer steps that train the projections alone.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        assert isinstance(model, ShadowPair)
        self.backbone = model.shadow.backbone
        self.steps = steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze or free the backbone for the step that begins."""
        self.backbone.requires_grad_(state.global_step >= self.steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the backbone free, however short the run was."""
        self.backbone.requires_grad_(True)
