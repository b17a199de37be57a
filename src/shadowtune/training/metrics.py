"""What the trainer tells while it works: ``metrics.jsonl``, and steps that are left out."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class MetricsFile(TrainerCallback):
    """Writes each log line of the trainer to a file, one JSON object a line; numbers that are none become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the step that training resumes from: they are about to be written again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text().split("\n")[:-1]  # what follows the last line break was cut off by a kill
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


class LeaveOutNonfinite(TrainerCallback):
    """Leaves an optimizer step out, moments included, if a gradient is no number.

    Every process sees the same averaged gradients, so all of them leave out the same steps.
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
        """Drop all gradients if one of them holds NaN or infinity: optimizers pass over what has none."""
        assert model is not None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            model.zero_grad(set_to_none=True)
            self.steps += 1
