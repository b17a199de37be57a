"""Checkpoints: directories that are complete or absent, with costs and digests beside the trainer's own files."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.trainer_utils import get_last_checkpoint

from shadowtune.errors import CheckpointError, ShadowtuneError, TrainingError
from shadowtune.model.files import is_write_error, replace_directory, staging_of, write_reason
from shadowtune.models import file_sha256
from shadowtune.training.parallelism import is_lost_process

PROGRESS = "progress.json"
DIGESTS = "files.json"
"""SHA-256 of every file of a checkpoint, by name."""


@dataclass(frozen=True)
class TrainingProgress:
    """Costs of a run up to a checkpoint."""

    seconds: float = 0.0
    """Wall-clock time of the training loop, including the parts before an interruption."""
    tokens: int = 0
    """Tokens processed by the model, without padding, on all processes."""
    skipped_steps: int = 0
    """Optimizer steps skipped because a gradient was NaN or infinite."""
    processes: int = 1
    """Number of processes."""


@contextmanager
def atomic_directory(target: Path, accelerator: Accelerator, checkpoints: Path | None = None) -> Iterator[Path]:
    """Context with a staging directory that replaces ``target`` atomically on exit.

    Every process enters and may write; the main one replaces the directory. After an error, or a kill at any time,
    ``target`` is unchanged.

    Args:
        target: the directory.
        accelerator: of the training.
        checkpoints: directory whose last checkpoint a write error names; by default the parent of ``target``.

    Raises:
        CheckpointError: if the files cannot be written, for instance because the disk is full.
    """
    staging = staging_of(target)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging.parent, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield staging
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_directory(target)
    except Exception as error:  # of any kind: tokenizers raises bare ones for a full disk
        shutil.rmtree(staging.parent, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, CheckpointError) else error  # of a nested save
        if isinstance(cause, ShadowtuneError) or not isinstance(cause, Exception) or is_lost_process(cause):
            raise
        if not is_write_error(cause) and not isinstance(cause, RuntimeError):  # torch.save's for a full disk
            raise
        raise CheckpointError(
            f"cannot write {target}: {write_reason(cause)}; {_resume_hint(checkpoints or target.parent)}"
        ) from error
    accelerator.wait_for_everyone()


@contextmanager
def convert_write_errors(run: Path, checkpoints: Path) -> Iterator[None]:
    """Context that turns an OSError, such as a full disk, into a TrainingError that names the last checkpoint."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ShadowtuneError):
            raise
        message = f"cannot write to {error.filename or run}: {write_reason(error)}; {_resume_hint(checkpoints)}"
        raise TrainingError(message) from error


def _resume_hint(checkpoints: Path) -> str:
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is None:
        return "no checkpoint was saved before"
    return f"checkpoints saved before are kept, --resume goes on from {last}"


def write_digests(checkpoint: Path) -> None:
    """Write the digests of all files of a checkpoint."""
    digests = {str(path.relative_to(checkpoint)): file_sha256(path) for path in _files_of(checkpoint)}
    (checkpoint / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


def write_progress(checkpoint: Path, progress: TrainingProgress) -> None:
    """Write ``progress.json`` into a checkpoint."""
    (checkpoint / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")


def read_progress(checkpoint: Path) -> TrainingProgress:
    """Read ``progress.json`` of a checkpoint; raises CheckpointError if that fails."""
    try:
        return TrainingProgress(**json.loads((checkpoint / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint / PROGRESS, checkpoint, error) from None


def check_checkpoint(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its digest.

    Raises:
        CheckpointError: naming the first file that is missing or differs, with a hint how to resume without it.
    """
    for name, digest in check_complete(checkpoint).items():
        try:
            found = file_sha256(checkpoint / name)
        except OSError as error:
            raise _damaged(checkpoint / name, checkpoint, error.strerror) from None
        if found != digest:
            raise _damaged(checkpoint / name, checkpoint, f"its contents are not those recorded in {DIGESTS}")


def check_complete(checkpoint: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's files by name; raises CheckpointError if a file is missing."""
    try:
        digests: Any = json.loads((checkpoint / DIGESTS).read_text())
        names = {str(path.relative_to(checkpoint)) for path in _files_of(checkpoint)}
        missing = sorted(digests.keys() - names)
    except FileNotFoundError:
        digests, missing = {}, [DIGESTS]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(checkpoint / DIGESTS, checkpoint, error) from None
    if missing:
        raise CheckpointError(
            f"{checkpoint / missing[0]} is missing; delete {checkpoint} to resume from the one before it"
        )
    return dict(digests)


def _files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / DIGESTS)


def _damaged(path: Path, checkpoint: Path, error: Any) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path} is damaged ({reason}); delete {checkpoint} to resume from the one before it")
