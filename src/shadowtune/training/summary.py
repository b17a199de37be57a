"""The costs of a run; their file, ``summary.json``, is the sign that the run has finished."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shadowtune.model.files import writing_into


@dataclass(frozen=True)
class TrainSummary:
    """Costs of a run."""

    method: str
    trainable_parameters: int
    steps: int
    train_seconds: float
    """Wall-clock time of all stages, with validation and checkpoints, including the parts before a resumption."""
    tokens_per_second: float
    """Tokens processed by the model, without padding, on all processes together, per second of the training loop (of
    the joint stage, if a shadow-only stage precedes it)."""
    peak_memory_mb: float
    """Of this process, including the loading of the model."""
    final_loss: float
    """Last training loss in the log, a mean over ``logging_steps`` steps."""
    skipped_steps: int
    """Optimizer steps skipped because a gradient was NaN or infinite."""
    detached_perplexity: float | None = None
    """exp of the detached shadow's loss on the validation data after pretraining; None if it was not measured."""
    shadow_seconds: float | None = None
    """The part of ``train_seconds`` that the shadow-only stage took; None without one."""
    distillation_seconds: float | None = None
    """The part of ``train_seconds`` that the distillation stage took, with its generated answers; None without one."""
    drafting_seconds: float | None = None
    """The part of ``train_seconds`` that the draft head stage took, with its generated answers; None without one."""
    deferral_seconds: float | None = None
    """The part of ``train_seconds`` in which the deferral head was fitted, with the answers; None without one."""
    fit_seconds: float | None = None
    """The part of ``train_seconds`` in which a weight of logits was fitted on validation data; None without a fit."""
    best_step: int | None = None
    """Step of the best evaluation, by ``metric_for_best_model``; None if evaluations are not compared."""
    best_metric: float | None = None
    """That evaluation's loss on the validation examples."""


def read_summary(file: Path) -> TrainSummary:
    """Read the summary of a finished run."""
    return TrainSummary(**json.loads(file.read_text()))


def write_summary(file: Path, summary: TrainSummary) -> None:
    """Write the summary, which marks the run as finished; raises CheckpointError if that fails."""
    with writing_into(file.parent) as staging:
        (staging / file.name).write_text(json.dumps(asdict(summary), indent=2) + "\n")
