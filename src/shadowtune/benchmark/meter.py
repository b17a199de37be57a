"""How much memory this process holds, and the most it has held since a given moment."""

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import torch

from shadowtune.provenance import peak_memory_mb

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Memory of this process: what torch allocated on a CUDA device, else what is resident.

    Where the kernel does not let the peak be reset (not Linux, or no /proc), the peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def give_back(self) -> None:
        """Return to the system what this process has freed but keeps for its next step, several GB on a CPU."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)

    def restart(self) -> None:
        """Give back what is free and count the peak from here on."""
        self.give_back()
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


def _status_mb(key: str) -> float:
    if not STATUS.exists():
        return peak_memory_mb()
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) / 2**10
