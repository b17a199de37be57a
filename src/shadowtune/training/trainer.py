"""``transformers.Trainer`` with the objectives of this package, and its arguments from the settings of a run.

Added: two learning rates, checkpoints that are complete or absent, a stop or skip at losses that are NaN, a data order
that survives a resumption, as do early stopping and the best checkpoint, and the terms of the loss in evaluations.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from shadowtune.attach.sharding import loaded_in_parts, whole_shape, whole_tensor
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, TrainingError
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.loading import load_tensors
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.model.objective import Objective, is_finite, joint_causal_objective
from shadowtune.training.callbacks import SkipNonfiniteSteps
from shadowtune.training.checkpoints import (
    TrainingProgress,
    atomic_directory,
    check_complete,
    read_progress,
    write_digests,
    write_progress,
)
from shadowtune.training.parallelism import asks_for_checkpointing
from shadowtune.training.sharding import ShardedTrainer

BACKBONE_PARTS = ("shadow.backbone.", "shadow.projection.", "shadow.input_projection.")
LORA_B_PARTS = (".lora_B.", ".lora_embedding_B.")
"""Names in PEFT of the LoRA matrices that start at zero."""


def training_arguments(config: TrainConfig, checkpoints: Path, quiet: bool = False) -> TrainingArguments:
    """Convert settings to ``transformers.TrainingArguments``; joins the processes of torchrun or accelerate.

    Args:
        config: the settings.
        checkpoints: directory of the checkpoints.
        quiet: whether to hide the progress bar, which only a terminal shows.

    Raises:
        ConfigError: if the hardware or an installed package does not support a setting.
    """
    _check_trackers(config.trackers)
    optimizer, checkpointing = config.optimizer, config.gradient_checkpointing
    if checkpointing == "off" and asks_for_checkpointing():
        checkpointing = "non_reentrant"
    save_steps = config.eval_steps if config.load_best_model_at_end else config.save_steps
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
            warmup_steps=optimizer.warmup_ratio,  # below 1: a share of the steps
            max_grad_norm=optimizer.max_grad_norm,
            seed=config.seed,
            bf16=config.autocast,
            activation_checkpointing=checkpointing != "off",
            activation_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
            torch_compile=config.compile,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps" if save_steps else "epoch",
            save_steps=save_steps or 500,
            eval_strategy="no" if not config.evaluates else "steps" if config.eval_steps else "epoch",
            eval_steps=config.eval_steps,
            prediction_loss_only=True,
            load_best_model_at_end=config.load_best_model_at_end,
            metric_for_best_model=config.metric_for_best_model if config.compares_losses else None,
            report_to=[name for name in config.trackers if name != "tensorboard"],  # that has a writer of its own
            run_name=str(checkpoints.parent),
            remove_unused_columns=False,
            use_cache=True,  # False would be written into the config that is saved; objectives ask for no cache
            ddp_find_unused_parameters=True if config.projection_steps else None,  # the backbone, while it is frozen
            ddp_broadcast_buffers=False,  # none changes, and a pretrained backbone's embedding is one
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=quiet or not sys.stderr.isatty(),
            use_cpu=not torch.accelerator.is_available(),
        )
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device per process; torchrun starts one for each
    return arguments


def _check_trackers(names: list[str]) -> None:
    """Raise ConfigError for the first experiment tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            package = "'shadowtune[tensorboard]'" if name == "tensorboard" else name
            raise ConfigError(f"report_to={name} needs the package {name}: pip install {package}")


class EpochSampler(Sampler[int]):
    """Sampler whose random order depends on seed and epoch only.

    A run resumed within an epoch continues with the remaining examples, and all processes agree on the order. An order
    drawn from the global generator would depend on dropout.

    Args:
        order: sampler that draws the order of one epoch.
        seed: of the run.
        epoch: returns the number of the current epoch, from 0.
    """

    def __init__(self, order: RandomSampler | LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.order = order
        self.order.generator = torch.Generator()
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Yield the indexes of the examples in the order of the current epoch."""
        self.order.generator.manual_seed(self.seed + self.epoch())
        return iter(self.order)


class ShadowTrainer(ShardedTrainer):
    """Trainer of every method: shadow, LoRA, DoRA, full fine-tuning and others of PEFT.

    Args:
        objective: function that computes the loss; see ``shadowtune.model.objective``.
        backbone_learning_rate: of the shadow's backbone and projections; None means the common one.
        lora_plus_ratio: learning rate of LoRA's B over the common one (LoRA+); None means the common one.
        skip_nonfinite: whether a step with a NaN or infinite gradient is skipped and counted, instead of an error.
        keep_checkpoints: number of the latest checkpoints to keep, the best among them if it will be loaded.
        **kwargs: as for ``transformers.Trainer``. Batches may hold "rows" (B,), the numbers of their rows, for errors.
            Evaluation measures the loss only.

    Raises:
        ConfigError: if an option replaces the objective's loss.
    """

    def __init__(
        self,
        *,
        objective: Objective = joint_causal_objective,
        backbone_learning_rate: float | None = None,
        lora_plus_ratio: float | None = None,
        skip_nonfinite: bool = False,
        keep_checkpoints: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, given in (
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("compute_loss_func", self.compute_loss_func is not None),
        ):
            if given:
                raise ConfigError(f"{name} has no effect here: the objective is the loss; leave it out")
        self._objective = objective
        self.backbone_learning_rate = backbone_learning_rate
        self.lora_plus_ratio = lora_plus_ratio
        self.skip_nonfinite = skip_nonfinite
        self.keep_checkpoints = keep_checkpoints
        self.model_accepts_loss_kwargs = True  # every objective divides by the labels of the whole step
        self._skipper = SkipNonfiniteSteps()
        if skip_nonfinite:
            self.add_callback(self._skipper)
        self._before = TrainingProgress()
        self._started = time.perf_counter()
        self._tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0
        self._last_terms: dict[str, Tensor] = {}
        self._evaluated: dict[str, list[Tensor]] = {}
        self._staging: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``transformers.Trainer`` does.

        From a checkpoint of the last step, or of an early stop, weights are loaded and no step is taken; transformers
        would take one.
        """
        self._started = time.perf_counter()
        if isinstance(resume_from_checkpoint, str):
            check_complete(Path(resume_from_checkpoint))  # transformers goes on without the optimizer's state
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            losses = [line["loss"] for line in state.log_history if "loss" in line]
            stopped = self._restore_early_stopping(state)
            if losses and (stopped or state.global_step >= self._total_steps()):
                self._load_from_checkpoint(resume_from_checkpoint)
                if loaded_in_parts(cast(nn.Module, self.model)):  # later stages run the model
                    self._share_weights()
                self.state = state
                if self.args.load_best_model_at_end:
                    self._load_best_model()
                return TrainOutput(state.global_step, losses[-1], {})
            if self.shares_states:
                self._load_from_checkpoint(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_global_step and not self.state.best_model_checkpoint:
            self._load_best_model()  # whose error says what is missing
        return output

    def _share_weights(self) -> None:
        """Hand a base in parts to FSDP2 without a step. FSDP2 sets itself up when the whole model is first called."""
        loader = self.get_train_dataloader()
        model, _ = self._prepare_for_training(self._total_steps(), loader, None)
        with torch.no_grad():
            self.compute_loss(model.eval(), self._prepare_inputs(next(iter(loader))))

    def _restore_early_stopping(self, state: TrainerState) -> bool:
        """Set the early stopping callback as it was at a checkpoint; returns whether it had stopped the training."""
        states: Any = state.stateful_callbacks  # in a file by the names of the callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = states[type(callback).__name__]
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
                return bool(callback.early_stopping_patience_counter >= callback.early_stopping_patience)
        return False

    @property
    def shards_weights(self) -> bool:
        """Whether no process has all weights: FSDP, and DeepSpeed ZeRO stage 3."""
        plugin = self.args.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _total_steps(self) -> int:
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def progress(self) -> TrainingProgress:
        """Return the costs so far, including those before a resumption. Every process must call it."""
        return TrainingProgress(
            seconds=self._before.seconds + time.perf_counter() - self._started,
            tokens=self._before.tokens + int(self.accelerator.gather(self._tokens).sum()),
            skipped_steps=self._before.skipped_steps + self._skipper.steps,
            processes=self.accelerator.num_processes,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with the non-empty groups of (common, backbone, LoRA+ B) x (with, without weight decay)."""
        if self.optimizer is not None:
            return self.optimizer
        trained = cast(Any, self.model if model is None else model)
        decayed = set(self.get_decay_parameter_names(trained))
        common = self.args.learning_rate
        backbone = common if self.backbone_learning_rate is None else self.backbone_learning_rate
        rates = (common, backbone, common * (self.lora_plus_ratio or 1.0))
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self._rate_index(name), name in decayed), []).append(parameter)
        self._groups = [list(group) for _, group in sorted(groups.items())]
        settings = [
            {"params": group, "lr": rates[part], "weight_decay": self.args.weight_decay if decay else 0.0}
            for (part, decay), group in sorted(groups.items())
        ]
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = kind(settings, **arguments)
        return self.optimizer

    def _rate_index(self, name: str) -> int:
        """Index of a parameter's learning rate: 0 common, 1 backbone, 2 LoRA+ B."""
        if name.removeprefix("module.").startswith(BACKBONE_PARTS):
            return 1
        return 2 if self.lora_plus_ratio is not None and any(part in name for part in LORA_B_PARTS) else 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of matrices; vectors (norms, biases, scales) and stacked biases have no weight decay."""
        return [
            name
            for name, parameter in model.named_parameters()
            if len(whole_shape(parameter)) >= 2 and not name.endswith(("bias", "biases"))
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch; in training, check that it is finite and accumulate its terms for the log."""
        inputs = dict(inputs)
        rows = inputs.pop("rows", None)
        if model.training:
            inputs |= self._scheduled_weight()
        terms = self._objective(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Losses are parts of a sum over all processes, but data parallelism averages the gradients.
            batches = self.accelerator.num_processes // self.get_tp_size()  # ranks of tensor parallelism share one
            terms = {name: term * batches for name, term in terms.items()}
        if model.training:
            if not self.skip_nonfinite and not is_finite(terms["loss"]):
                raise TrainingError(self._nonfinite_error(terms["loss"], rows))
            mask = inputs.get("attention_mask")
            self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
            self._accumulate(terms)
        else:
            self._last_terms = terms
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch forward and backward; the returned loss, for the log, has NaN and infinity replaced by 0."""
        return torch.nan_to_num(super().training_step(*args, **kwargs), 0.0, 0.0, 0.0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing the state of the random number generators."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        self._evaluated = {}
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Measure the loss of one batch, and keep its terms, weighted as transformers weighs the loss."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        for name, term in self._last_terms.items():
            if name != "loss":
                each = self.accelerator.gather_for_metrics(term.repeat(self.args.eval_batch_size))
                self._evaluated.setdefault(name, []).append(each.float().cpu())
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the joint loss to each line: of training, means over the steps since the last line."""
        if "eval_loss" in logs:
            logs |= {f"eval_{name}": float(torch.cat(parts).mean()) for name, parts in self._evaluated.items()}
        if "loss" in logs:
            steps = self.state.global_step - self._terms_since
            for name, total in self._terms.items():
                logs[name] = self.accelerator.gather(total).mean().item() / steps
            self._terms = {}
            if self.skip_nonfinite:
                logs["skipped_steps"] = self._before.skipped_steps + self._skipper.steps
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draw the order of examples from seed and epoch alone."""
        order = super()._get_train_sampler(train_dataset)
        if not isinstance(order, RandomSampler | LengthGroupedSampler):
            return order
        return EpochSampler(order, self.args.seed, lambda: int(self.state.epoch or 0))

    def _scheduled_weight(self) -> dict[str, float]:
        """Return lambda at this step, linear from the first to the last step, if ``shadow_loss_weight_end`` is set."""
        if not isinstance(self.model, ShadowPreTrainedModel):
            return {}
        config = self.model.shadow.config
        if config.shadow_loss_weight_end is None:
            return {}
        share = self.state.global_step / max(1, self.state.max_steps - 1)
        start, end = config.shadow_loss_weight, config.shadow_loss_weight_end
        return {"shadow_loss_weight": start + (end - start) * min(1.0, share)}

    def _nonfinite_error(self, loss: Tensor, rows: Tensor | None) -> str:
        where = f"step {self.state.global_step + 1}"
        if rows is not None:
            where += f", training rows {', '.join(str(row) for row in rows.tolist())}"
        return (
            f"the loss became {loss.item()} at {where}; the last checkpoint is untouched. Lower the learning rate, or "
            "set nonfinite_loss=skip to leave such steps out"
        )

    def _accumulate(self, terms: dict[str, Tensor]) -> None:
        if not self._terms:
            self._terms_since = self.state.global_step
        for name, term in terms.items():
            if name != "loss":
                number = torch.nan_to_num(term.detach(), 0.0, 0.0, 0.0)
                self._terms[name] = self._terms[name] + number if name in self._terms else number

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging directory and rename it, so that every checkpoint is complete.

        Raises:
            TrainingError: if a trained parameter is NaN or infinite; the previous checkpoint stays the last one.
            CheckpointError: if the files cannot be written; likewise.
        """
        step = self.state.global_step
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if parameter.requires_grad and not is_finite(whole_tensor(parameter)):
                raise TrainingError(f"{name} holds NaN or infinite values at step {step}; not saved")
        directory, progress = Path(super()._get_output_dir(trial)), self.progress()
        target = directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with atomic_directory(target, self.accelerator, directory) as staging:
            self._staging = staging.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.state.best_model_checkpoint = self._best_checkpoint(step)
            if self.args.should_save:
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))  # transformers wrote the staging path
                write_progress(staging, progress)
            self.accelerator.wait_for_everyone()  # other processes write their random states
            if self.args.should_save:
                write_digests(staging)
        if self.args.should_save:
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            rotate_checkpoints(str(directory), max(1, self.keep_checkpoints), best)

    def _best_checkpoint(self, saving: int | None = None) -> str | None:
        """Return the path of the checkpoint with the best metric, if it was saved or ``saving`` is its step."""
        best = self.state.best_global_step
        path = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        return str(path) if best and (best == saving or path.is_dir()) else None

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        if best is None:
            raise TrainingError(
                f"the best checkpoint, of step {self.state.best_global_step}, is gone from {self.args.output_dir}; "
                "start anew, or set load_best_model_at_end=false for the last weights"
            )
        check_complete(Path(best))
        self._load_weights(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._before = read_progress(Path(resume_from_checkpoint))
        before, now = self._before.processes, self.accelerator.num_processes
        if before != now:
            raise ConfigError(
                f"{resume_from_checkpoint} was written by {before} process(es) and cannot be resumed with {now}: every "
                f"step would see other rows; start {before}"
            )
        self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if self.shares_states:
            self._load_shared_weights(checkpoint)
        elif isinstance(self.model, ShadowPreTrainedModel):
            load_tensors(self.model.trained_modules(), read_tensors(checkpoint), checkpoint)
        else:
            super()._load_from_checkpoint(checkpoint, model)


def with_row_numbers(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap a collator so that batches hold "rows" (B,), the "row" number of each example."""

    def collate_numbered(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(examples), "rows": torch.tensor([example["row"] for example in examples])}

    return collate_numbered
