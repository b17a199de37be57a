"""A subject that repeats one step: warmed up, timed, its memory read, and what it holds given back between samples."""

import time
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from shadowtune.benchmark.bench import Settings
from shadowtune.benchmark.meter import MemoryMeter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The precisions that the command line knows."""


class TimedSubject:
    """What all subjects share; a subclass says what a step is, and what it counts.

    A subclass calls ``mark_loaded`` when all it keeps is in memory.
    """

    sample_seconds: ClassVar[float] = 0.1
    """A sample takes as many steps as fit into this time, at least one: the clock is coarse."""

    def __init__(self, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self.warm_up = settings.warm_up
        self.facts: Mapping[str, float | str] = {}
        self.size: str | None = None
        self.trainable_parameters = 0
        self.memory = MemoryMeter(self.device)
        self.loaded_mb = 0.0
        self.steps = 1

    def mark_loaded(self, model: nn.Module) -> None:
        """Count memory from here on as that of a step."""
        for parameter in model.parameters():
            parameter.sum()  # weights mapped from a file are resident only when read, and would count as the step's
        self.memory.restart()
        self.loaded_mb = self.memory.current_mb()

    def warm(self) -> float:
        """Warm up, choose how many steps a sample takes, and return the peak memory of a step, MB."""
        self.memory.restart()
        self._time(self.warm_up)
        self.steps = max(1, round(self.sample_seconds / self._time(1)))
        peak = self.memory.peak_mb()
        self.memory.give_back()
        return max(0.0, peak - self.loaded_mb)

    def steps_per_second(self) -> float:
        """Take one sample.

        The memory of a step is given back after each sample, else six subjects that wait hold 20 GB; the steps of the
        warm-up take it again, untimed.
        """
        self._time(self.warm_up)
        seconds = self._time(self.steps)
        self.memory.give_back()
        return self.steps / seconds

    def _step(self) -> None:
        raise NotImplementedError

    def _time(self, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
