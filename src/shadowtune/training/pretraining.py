"""Training a shadow before any task: its backbone and projections learn language, its boundaries wait for the task."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowtune.config.training import TrainConfig
from shadowtune.core.losses import labelled_rows
from shadowtune.core.top_tokens import TopTokens, top_tokens
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.checkpoint import tensor_checksum
from shadowtune.model.pair import ShadowPair
from shadowtune.training.rows import Collator, TrainingRows
from shadowtune.training.teacher_cache import ROWS, TaughtRows


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
    if model.shadow.draft_fusion is not None:
        model.shadow.draft_fusion.requires_grad_(False)
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


def taught_rows(
    config: TrainConfig,
    model: nn.Module,
    rows: TrainingRows,
    accelerator: Accelerator,
    report: Callable[[str], None] = lambda line: None,
) -> TaughtRows:
    """Return the training rows with what the base predicts for them, after running it for those it is not known for.

    Args:
        config: with ``distillation_cache``, the directory.
        model: in stage "pretrain", on its device.
        rows: encoded.
        accelerator: of the trainer; its processes share the work.
        report: called with lines for the user.

    Raises:
        ConfigError: if the directory belongs to another base, other rows or other settings.
        CheckpointError: if a file is damaged or cannot be written.
    """
    assert isinstance(model, ShadowForCausalLM) and config.distillation_cache is not None
    taught = TaughtRows(rows.train, config.distillation_cache, teacher_facts(config, model))
    missing = list(taught.missing())
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    k = config.shadow.distillation_top_k
    report(
        f"teacher: the {k} most likely tokens at {taught.positions:,} positions in {taught.directory}, "
        + (f"{len(missing)} files of up to {ROWS} rows to be filled" if missing else "all known")
    )
    model.base.eval()
    for done, first in enumerate(missing, 1):
        if done % accelerator.num_processes == accelerator.process_index:
            with accelerator.autocast():
                taught.write(first, _predictions(model, taught.rows_from(first), rows.collate, config.batch_size))
        if done * 10 // len(missing) > (done - 1) * 10 // len(missing):
            report(f"teacher: {done} of {len(missing)} files")
    accelerator.wait_for_everyone()
    if (lost := next(taught.missing(), None)) is not None:
        raise CheckpointError(
            f"distillation_cache={taught.directory} lacks the rows from {lost} on, which another process has written; "
            "name a directory that all machines share"
        )
    return taught


def teacher_facts(config: TrainConfig, model: ShadowForCausalLM) -> dict[str, str]:
    """Name everything beside the rows that the base's predictions depend on."""
    head = {name: tensor.cpu() for name, tensor in model.get_output_embeddings().named_parameters()}
    shadow = config.shadow
    return {
        "base": model.config.base_fingerprint
        or f"{config.model}@{config.revision}",  # quantized, it has no fingerprint
        "head": tensor_checksum(head)[:16],
        "base_dtype": config.base_dtype,
        "base_quantization": config.base_quantization,
        "autocast": str(config.autocast),
        "distillation_top_k": str(shadow.distillation_top_k),
        "distillation_temperature": str(shadow.distillation_temperature),
    }


@torch.no_grad()
def _predictions(model: ShadowForCausalLM, rows: Any, collate: Collator, batch_size: int) -> TopTokens:
    """Run the bare base; (labelled positions of all rows, k)."""
    weights = model.loss_weights()
    assert weights.top_k is not None
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = send_to_device(collate(rows[start : start + batch_size]), model.device)
        labels = batch.pop("labels")
        _, hidden_states = labelled_rows(labels, model.base_states(**batch))
        parts.append(top_tokens(model.head, hidden_states, weights.top_k, weights.temperature))
    return TopTokens(*(torch.cat(each) for each in zip(*parts, strict=True)))
