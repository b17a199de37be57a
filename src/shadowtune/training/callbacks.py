"""Callbacks of ``transformers.Trainer``: metrics file, skipped steps, interruption, projection warm-up."""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowtune.model.modeling import ShadowPreTrainedModel


class MetricsFile(TrainerCallback):
    """Writes each log of the trainer to a file as one JSON object per line; NaN and infinity become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the step that training resumes from, which will be written again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text().split("\n")[:-1]  # an incomplete last line of a killed run
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= state.global_step]
        scratch = self.path.with_name(f".{self.path.name}")
        scratch.write_text("".join(kept))
        os.replace(scratch, self.path)

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
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
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
