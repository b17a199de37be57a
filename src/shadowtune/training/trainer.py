"""A thin ``transformers.Trainer``: our loss, two learning rates, whole checkpoints, and a stop at numbers that are none."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from shadowtune.errors import TrainingError
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.loading import load_tensors
from shadowtune.model.pair import ShadowPair
from shadowtune.training.objective import causal_loss, is_finite

STAGING = ".saving"
BACKBONE_PARTS = ("shadow.backbone.", "shadow.projection.", "shadow.input_projection.")


class ShadowTrainer(Trainer):
    """Trains every method: shadow, lora, dora and full.

    Args:
        backbone_learning_rate: of the shadow's backbone and projections; None means the common one.
        skip_nonfinite: whether a batch whose loss is no number is left out (and counted) instead of stopping.
        keep_checkpoints: how many of the latest checkpoints stay on disk.
        **kwargs: as for ``transformers.Trainer``. Batches may carry "rows" (B,), the numbers of their rows, for messages.
    """

    def __init__(
        self,
        *,
        backbone_learning_rate: float | None = None,
        skip_nonfinite: bool = False,
        keep_checkpoints: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone_learning_rate = backbone_learning_rate
        self.skip_nonfinite = skip_nonfinite
        self.keep_checkpoints = keep_checkpoints
        self.skipped_batches = 0
        self._terms: dict[str, list[Tensor]] = {}
        self._staging: str | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with four groups: (common, backbone) x (with, without weight decay); empty ones are left out."""
        if self.optimizer is not None:
            return self.optimizer
        trained = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(trained))
        common = self.args.learning_rate
        rates = {False: common, True: common if self.backbone_learning_rate is None else self.backbone_learning_rate}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                key = (name.removeprefix("module.").startswith(BACKBONE_PARTS), name in decayed)
                groups.setdefault(key, []).append(parameter)
        settings = [
            {"params": group, "lr": rates[backbone], "weight_decay": self.args.weight_decay if decay else 0.0}
            for (backbone, decay), group in sorted(groups.items())
        ]
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = kind(settings, **arguments)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; vectors (norms, biases, scales), stacked or not, do not."""
        vectors = ("bias", "biases", "norm_weight", "boundary_scales")
        return [
            name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and not name.endswith(vectors)
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch; in training, check that it is a number."""
        inputs = dict(inputs)
        rows = inputs.pop("rows", None)
        plain = self.accelerator.unwrap_model(model)
        if return_outputs or isinstance(plain, ShadowPair) or inputs["labels"].ndim == 1:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
            loss = outputs.loss
            if model.training:
                self._note_terms(outputs)
        else:
            outputs, loss = None, causal_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients, the loss is a sum
        if model.training and not is_finite(loss):
            loss = self._refuse(loss, rows)
        return (loss, outputs) if return_outputs else loss

    def _note_terms(self, outputs: Any) -> None:
        for name in ("base_loss", "shadow_loss"):
            if outputs.get(name) is not None:
                self._terms.setdefault(name, []).append(outputs[name].detach())

    def _refuse(self, loss: Tensor, rows: Tensor | None) -> Tensor:
        """Leave the batch out, or stop with its name."""
        where = f"step {self.state.global_step + 1}"
        if rows is not None:
            where += f", training rows {', '.join(str(int(row)) for row in rows)}"
        if self.skip_nonfinite and self.accelerator.num_processes == 1:
            self.skipped_batches += 1
            return torch.zeros((), device=loss.device, requires_grad=True)
        raise TrainingError(
            f"the loss became {loss.item()} at {where}; the last checkpoint is untouched. Lower the learning rate, or set "
            "nonfinite_loss=skip to leave such batches out"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the two terms of the joint loss to each training log line, averaged since the last one."""
        if "loss" in logs:
            steps = self.args.gradient_accumulation_steps
            for name, values in self._terms.items():
                logs[name] = torch.stack(values).mean().item() * steps
            self._terms = {}
            if self.skipped_batches:
                logs["skipped_batches"] = float(self.skipped_batches)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return run if self._staging is None else os.path.join(run, self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that every checkpoint directory is whole.

        Raises:
            TrainingError: if a trained parameter is no number; the previous checkpoint stays the last one.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not is_finite(parameter):
                raise TrainingError(f"{name} holds NaN or infinite values at step {self.state.global_step}; not saved")
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in (run / STAGING / name).rglob("*"):
                _sync(path)
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(run / STAGING / name, run / name)
            _sync(run)
            shutil.rmtree(run / STAGING, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, ShadowPair):
            load_tensors(self.model.trained_modules(), read_tensors(resume_from_checkpoint), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_rows(collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Any]]:
    """Let a collator pass on each example's "row", its number in the data set, as a tensor (B,)."""

    def collate_rows(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(collate([{k: v for k, v in e.items() if k != "row"} for e in examples]))
        batch["rows"] = torch.tensor([example["row"] for example in examples])
        return batch

    return collate_rows
