"""Provenance of measurements: commit, versions, hardware, date; and the peak memory of this process."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("shadowtune", "torch", "transformers", "accelerate", "peft", "shadow-peft", "trl")
"""Packages whose versions are recorded, if they are installed."""


def provenance() -> dict[str, Any]:
    """Describe this process: date (UTC), command, commit of the source tree, versions, processor, threads, devices."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name) is not None},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _device_names(),
    }


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: of the accelerator's allocator, else resident."""
    accelerator = _accelerator()
    if accelerator is not None:
        return float(accelerator.max_memory_allocated()) / 2**20
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _accelerator() -> Any:
    """Return torch's module of an accelerator that has memory statistics (CUDA, XPU); None without one."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return module if module in (torch.cuda, torch.xpu) else None


def _device_names() -> list[str]:
    accelerator = _accelerator()
    return [] if accelerator is None else [accelerator.get_device_name(i) for i in range(accelerator.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # installed: a repository around the environment would not be ours
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
