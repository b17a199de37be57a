"""Directories that are whole or absent, and what a checkpoint records beside the trainer's own files."""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from shadowtune.errors import CheckpointError, ShadowtuneError

STAGING = ".saving"
"""Directory, beside the finished ones, in which a new one grows."""
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """What a run has cost up to a checkpoint."""

    seconds: float = 0.0
    """Wall-clock time of the training loop, all parts of an interrupted run together."""
    tokens: int = 0
    """Tokens that went through the model, padding left out, on all processes."""
    skipped_steps: int = 0
    """Optimizer steps left out because a gradient was no number."""
    processes: int = 1
    """How many processes trained together."""


@contextmanager
def whole_directory(target: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Context: fill a staging directory, which then takes the place of ``target`` in one step.

    Every process enters and may write; the first one makes the exchange. After an error, or a kill at any moment,
    ``target`` is what it was.

    Raises:
        CheckpointError: if the files cannot be written, for instance because the disk is full.
    """
    staging = target.parent / STAGING / target.name
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging.parent, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield staging
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _exchange(staging, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(staging.parent, ignore_errors=True)
        if isinstance(error, ShadowtuneError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot write {target}: {reason}; checkpoints saved before are kept") from error
    accelerator.wait_for_everyone()


def _exchange(staging: Path, target: Path) -> None:
    """Flush everything under ``staging`` to the disk and rename it to ``target``."""
    for path in [*staging.rglob("*"), staging]:
        _flush(path)
    if target.exists():
        os.replace(target, staging.parent / "old")
    os.replace(staging, target)
    _flush(target.parent)
    shutil.rmtree(staging.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make the operating system write a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_progress(checkpoint: Path, progress: Progress) -> None:
    """Write the costs so far into a checkpoint."""
    (checkpoint / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")


def read_progress(checkpoint: Path) -> Progress:
    """Return the costs up to a checkpoint; raises CheckpointError if they cannot be read."""
    try:
        return Progress(**json.loads((checkpoint / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint / PROGRESS, checkpoint, error) from None


def check_checkpoint(checkpoint: Path) -> None:
    """Read every file of a checkpoint through; torch's archives carry checksums.

    Raises:
        CheckpointError: naming the first file that is damaged, and how to go on without this checkpoint.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise zipfile.BadZipFile("its contents do not match their checksum")
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise _damaged(path, checkpoint, error) from None


def _damaged(path: Path, checkpoint: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path} is damaged ({reason}); delete {checkpoint} to resume from the one before it")
