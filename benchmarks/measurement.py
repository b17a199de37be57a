"""Timed candidates: warm-up, samples of a repeated step, peak memory, and release of memory between samples."""

import contextlib
import ctypes
import gc
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from benchmarks.bases import load_benchmark_base
from benchmarks.benchmark import Settings
from benchmarks.methods import Method
from shadowtune.model.methods import trainable_parameters
from shadowtune.provenance import peak_memory_mb

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Precisions of the command line options."""
NOISE = 0.01
"""Standard deviation of what ``perturb`` adds."""


class MemoryMeter:
    """Memory of this process: allocated by torch on a CUDA device, else resident.

    Where the kernel cannot reset the peak (not Linux, or no /proc), the peak is that since the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def release(self) -> None:
        """Return freed memory to the system, which allocators otherwise keep: several GB on a CPU."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)

    def restart(self) -> None:
        """Release free memory and reset the peak."""
        self.release()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR_REFS.exists():
            with contextlib.suppress(OSError):
                CLEAR_REFS.write_text("5")

    def current_mb(self) -> float:
        """Memory held now, MB."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20
        return _status_mb("VmRSS")

    def peak_mb(self) -> float:
        """Most memory held at once since ``restart``, MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _status_mb("VmHWM")


def map_large_arrays() -> None:
    """Let glibc map each array of 256 kB or more by itself, so that its memory is returned when it is freed.

    By default it raises that threshold to 32 MB, and the heap of a training step holds up to 1.4 times what is alive.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**18)


def _status_mb(key: str) -> float:
    if not STATUS.exists():
        return peak_memory_mb()
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) / 2**10


class TimedCandidate:
    """Base class of the candidates. A subclass defines ``_step`` and what it counts.

    A subclass calls ``mark_loaded`` as soon as everything that it keeps is in memory.
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
        """Warm up, choose the steps of a sample, and return the peak memory of a step, MB."""
        self.memory.restart()
        self._time(self.warm_up)
        self.steps = max(1, round(self.sample_seconds / self._time(1)))
        peak = self.memory.peak_mb()
        self.memory.release()
        return max(0.0, peak - self.loaded_mb)

    def steps_per_second(self) -> float:
        """Take one sample.

        The memory of a step is released after each sample, else six waiting candidates hold 20 GB; the steps of the
        warm-up allocate it again, untimed.
        """
        self._time(self.warm_up)
        seconds = self._time(self.steps)
        self.memory.release()
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


class ModelCandidate(TimedCandidate):
    """A candidate that is a base adapted by a method."""

    model: nn.Module
    vocabulary: int
    """V, from which inputs are drawn."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.dtype = DTYPES[settings.dtype]

    def load(self, base_name: str, method: Method, size: int | None) -> None:
        """Load a base and adapt it; all candidates start from the same seed."""
        torch.manual_seed(0)
        base = load_benchmark_base(base_name, self.dtype, self.device)
        self.vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self.model = method.build(base, size).to(self.device)
        self.size = method.describe(size)
        self.trainable_parameters = trainable_parameters(self.model)


@torch.no_grad()
def perturb(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert every trained parameter to ``dtype`` and add a little noise: at its start an adapter may do nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + NOISE * torch.randn_like(parameter)).to(dtype)
