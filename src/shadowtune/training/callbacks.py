"""Callbacks of ``transformers.Trainer``: metrics, trackers, progress lines, skipped steps, interruption, warm-up."""

import contextlib
import datetime
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from shadowtune.attach.sharding import whole_tensor
from shadowtune.model.modeling import ShadowPreTrainedModel


class MetricsFile(TrainerCallback):
    """Writes each log of the trainer to a file as one JSON object per line; NaN and infinity become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the step that training resumes from, which will be written again."""
        if state.is_world_process_zero:
            drop_later_lines(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            values = {name: value if math.isfinite(value) else None for name, value in logs.items()}
            with self.path.open("a") as handle:
                handle.write(json.dumps({"step": state.global_step, **values}) + "\n")


def drop_later_lines(file: Path, step: int) -> None:
    """Remove the lines of a JSON lines file with a "step" above ``step``, and the incomplete last line of a killed run.

    A run that is resumed from that step writes them again, so that the file of a resumed run is that of a whole one.
    """
    if not file.exists():
        return
    lines = file.read_text().split("\n")[:-1]
    scratch = file.with_name(f".{file.name}")
    scratch.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
    os.replace(scratch, file)


def tensorboard_callback(directory: Path, checkpoint: str | None) -> TensorBoardCallback:
    """Return transformers' callback that writes TensorBoard files into a directory.

    Args:
        directory: of the files.
        checkpoint: from which the run is resumed; TensorBoard then hides what an earlier part wrote after it.
    """
    from torch.utils.tensorboard import SummaryWriter

    resumed = None if checkpoint is None else int(checkpoint.rpartition("-")[2]) + 1
    return TensorBoardCallback(SummaryWriter(str(directory), purge_step=resumed))


class FinishWandb(TrainerCallback):
    """Ends the Weights & Biases run of a training, so that the next stage, in the same process, has one of its own.

    transformers' integrations of the other trackers do so by themselves.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run; its data are sent by then."""
        importlib.import_module("wandb").finish()


class TerminalProgress(ProgressCallback):
    """transformers' progress bar, which prints no logs of its own, so that standard output has results only.

    Args:
        report: called with lines while there is no bar.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self.report = report

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing; ``ProgressLines`` does."""

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self.training_bar is None:
            self.report(line)
        else:
            self.training_bar.write(line, file=sys.stderr)


class ProgressLines(TrainerCallback):
    """Reports the progress of a training in whole lines.

    Args:
        report: called with each line.
    """

    LINES = 50
    """About so many lines of training losses in a run; every evaluation has a line of its own."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._begun, self._first = time.perf_counter(), state.global_step
        self._shown = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a line if one is due."""
        step, last, logs = state.global_step, state.max_steps, logs or {}
        where = f"step {step} of {last}"
        if "loss" in logs and (step == last or step - self._shown >= last / self.LINES):
            seconds = (time.perf_counter() - self._begun) / (step - self._first) * (last - step)
            left = datetime.timedelta(seconds=round(seconds))
            self.report(f"{where} ({step / last:.0%}): loss {logs['loss']:.4g}, {left} left")
            self._shown = step
        if "eval_loss" in logs:
            names = {"attached": "eval_base_loss", "detached": "eval_shadow_loss"}
            terms = [f"{mode} {logs[name]:.4g}" for mode, name in names.items() if name in logs]
            shown = f" ({', '.join(terms)})" if terms else ""
            self.report(f"{where}: validation loss {logs['eval_loss']:.4g}{shown}")


class SkipNonfiniteSteps(TrainerCallback):
    """Skips an optimizer step, moments included, if a gradient is NaN or infinite.

    Every process has the same averaged gradients, so all skip the same steps.

    Attributes:
        steps: number of skipped steps.
    """

    def __init__(self) -> None:
        self.steps = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Remove all gradients if one is not finite; optimizers ignore parameters without a gradient."""
        assert model is not None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(whole_tensor(torch.nn.utils.get_total_norm(gradients))):
            model.zero_grad(set_to_none=True)
            self.steps += 1


class GracefulInterrupt(TrainerCallback):
    """Turns Ctrl-C into a KeyboardInterrupt between two steps; a second Ctrl-C interrupts at once.

    An exception raised at an arbitrary point can end in a callback of the garbage collector, which swallows it.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context that handles Ctrl-C; only in the main thread, as no other thread receives signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _stop(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Stop before a step, after the log, evaluation and checkpoint of the last one."""
        self._stop()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop between two batches of a step."""
        self._stop()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Stop between two batches of an evaluation."""
        self._stop()


class ProjectionWarmup(TrainerCallback):
    """Trains only the shadow's projections in the first steps of pretraining; its backbone is frozen until then.

    Args:
        model: with a shadow.
        steps: number of optimizer steps, including those before a resumption.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        assert isinstance(model, ShadowPreTrainedModel)
        self.backbone = model.shadow.backbone
        self.steps = steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze or unfreeze the backbone for this step."""
        self.backbone.requires_grad_(state.global_step >= self.steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze the backbone."""
        self.backbone.requires_grad_(True)
