"""A thin ``transformers.Trainer``: our loss, two learning rates, whole checkpoints, a stop at losses that are NaN."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from shadowtune.errors import ConfigError, TrainingError
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.loading import load_tensors
from shadowtune.model.objective import Objective, is_finite
from shadowtune.model.pair import ShadowPair
from shadowtune.training.checkpoints import (
    Progress,
    check_complete,
    read_progress,
    whole_directory,
    write_files,
    write_progress,
)
from shadowtune.training.metrics import LeaveOutNonfinite
from shadowtune.training.sampling import EpochSampler

BACKBONE_PARTS = ("shadow.backbone.", "shadow.projection.", "shadow.input_projection.")


class ShadowTrainer(Trainer):
    """Trains every method: shadow, lora, dora and full.

    Args:
        objective: what is minimized; see ``shadowtune.model.objective``.
        backbone_learning_rate: of the shadow's backbone and projections; None means the common one.
        skip_nonfinite: whether a step with a gradient that is no number is left out (and counted) instead of stopping.
        keep_checkpoints: how many of the latest checkpoints stay on disk.
        **kwargs: as for ``transformers.Trainer``. Batches may carry "rows" (B,), their rows' numbers, for messages.
            Evaluation measures the loss alone.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        backbone_learning_rate: float | None = None,
        skip_nonfinite: bool = False,
        keep_checkpoints: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._objective = objective
        self.backbone_learning_rate = backbone_learning_rate
        self.skip_nonfinite = skip_nonfinite
        self.keep_checkpoints = keep_checkpoints
        self.model_accepts_loss_kwargs = True  # every objective divides by the labels of the whole step
        self._left_out = LeaveOutNonfinite()
        if skip_nonfinite:
            self.add_callback(self._left_out)
        self._before = Progress()
        self._started = time.perf_counter()
        self._tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0
        self._staging: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``transformers.Trainer`` does, and keep the time.

        A checkpoint of the last step is loaded and that is all: transformers would take a further step.
        """
        self._started = time.perf_counter()
        if isinstance(resume_from_checkpoint, str):
            check_complete(Path(resume_from_checkpoint))  # transformers goes on without the optimizer's state
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            losses = [line["loss"] for line in state.log_history if "loss" in line]
            if losses and state.global_step >= self._total_steps():
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, losses[-1], {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _total_steps(self) -> int:
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def progress(self) -> Progress:
        """Return what the run has cost so far, parts before a resumption included. Every process must call it."""
        return Progress(
            seconds=self._before.seconds + time.perf_counter() - self._started,
            tokens=self._before.tokens + int(self.accelerator.gather(self._tokens).sum()),
            skipped_steps=self._before.skipped_steps + self._left_out.steps,
            processes=self.accelerator.num_processes,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with four groups: (common, backbone) x (with, without weight decay); empty ones are left out."""
        if self.optimizer is not None:
            return self.optimizer
        trained = cast(Any, self.model if model is None else model)
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
        """Matrices decay; vectors (norms, biases, scales) do not, nor do biases stacked to a matrix."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.endswith(("bias", "biases"))
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch; in training, check that it is a number and add up what is logged."""
        inputs = dict(inputs)
        rows = inputs.pop("rows", None)
        if model.training:
            inputs |= self._annealed()
        terms = self._objective(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Losses are shares of a sum over all processes, but data parallelism averages the gradients.
            terms = {name: term * self.accelerator.num_processes for name, term in terms.items()}
        if model.training:
            if not self.skip_nonfinite and not is_finite(terms["loss"]):
                raise TrainingError(self._nonfinite(terms["loss"], rows))
            mask = inputs.get("attention_mask")
            self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
            self._add_up(terms)
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch forward and backward; the returned loss, which is for the log, is a number in any case."""
        return torch.nan_to_num(super().training_step(*args, **kwargs), 0.0, 0.0, 0.0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the validation rows, without a trace in the random numbers that training will draw."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the two terms of the joint loss to each training log line, as means over the steps since the last one."""
        if "loss" in logs:
            steps = self.state.global_step - self._terms_since
            for name, total in self._terms.items():
                logs[name] = self.accelerator.gather(total).mean().item() / steps
            self._terms = {}
            if self.skip_nonfinite:
                logs["skipped_steps"] = self._before.skipped_steps + self._left_out.steps
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Let seed and epoch alone decide the order of rows, whatever was drawn before and in which process."""
        order = super()._get_train_sampler(train_dataset)
        if not isinstance(order, RandomSampler | LengthGroupedSampler):
            return order
        return EpochSampler(order, self.args.seed, lambda: int(self.state.epoch or 0))

    def _annealed(self) -> dict[str, float]:
        """Lambda at this step, where it is to move: from its start at the first step to its end at the last."""
        if not isinstance(self.model, ShadowPair):
            return {}
        config = self.model.shadow.config
        if config.shadow_loss_weight_end is None:
            return {}
        share = self.state.global_step / max(1, self.state.max_steps - 1)
        start, end = config.shadow_loss_weight, config.shadow_loss_weight_end
        return {"shadow_loss_weight": start + (end - start) * min(1.0, share)}

    def _nonfinite(self, loss: Tensor, rows: Tensor | None) -> str:
        where = f"step {self.state.global_step + 1}"
        if rows is not None:
            where += f", training rows {', '.join(str(row) for row in rows.tolist())}"
        return (
            f"the loss became {loss.item()} at {where}; the last checkpoint is untouched. Lower the learning rate, or "
            "set nonfinite_loss=skip to leave such steps out"
        )

    def _add_up(self, terms: dict[str, Tensor]) -> None:
        if not self._terms:
            self._terms_since = self.state.global_step
        for name, term in terms.items():
            if name != "loss":
                number = torch.nan_to_num(term.detach(), 0.0, 0.0, 0.0)
                self._terms[name] = self._terms[name] + number if name in self._terms else number

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that every checkpoint directory is whole.

        Raises:
            TrainingError: if a trained parameter is no number; the previous checkpoint stays the last one.
            CheckpointError: if the files cannot be written; likewise.
        """
        step = self.state.global_step
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if parameter.requires_grad and not is_finite(parameter):
                raise TrainingError(f"{name} holds NaN or infinite values at step {step}; not saved")
        directory, progress = Path(super()._get_output_dir(trial)), self.progress()
        target = directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with whole_directory(target, self.accelerator, directory) as staging:
            self._staging = staging.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.args.should_save:
                write_progress(staging, progress)
            self.accelerator.wait_for_everyone()  # for the states of the others' random numbers
            if self.args.should_save:
                write_files(staging)
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(directory), save_total_limit=self.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._before = read_progress(Path(resume_from_checkpoint))
        before, now = self._before.processes, self.accelerator.num_processes
        if before != now:
            raise ConfigError(
                f"{resume_from_checkpoint} was written by {before} process(es) and cannot be resumed with {now}: every "
                f"step would see other rows; start {before}"
            )
        if isinstance(self.model, ShadowPair) and not self.is_fsdp_enabled:
            load_tensors(self.model.trained_modules(), read_tensors(resume_from_checkpoint), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def with_row_numbers(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Let a collator pass on each example's "row", its number in the data set, as a tensor "rows" (B,)."""

    def collate_numbered(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(examples), "rows": torch.tensor([example["row"] for example in examples])}

    return collate_numbered
