"""Directories that are whole or absent, and what a checkpoint records beside the trainer's own files."""

import dataclasses
import hashlib
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
from shadowtune.model.checkpoint import is_write_error, write_reason
from shadowtune.model.replacement import replace_directory, staging_of

PROGRESS = "progress.json"
FILES = "files.json"
"""Names of all files of a checkpoint, each with the SHA-256 of its contents."""


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
def whole_directory(target: Path, accelerator: Accelerator, checkpoints: Path | None = None) -> Iterator[Path]:
    """Context: fill a staging directory, which then takes the place of ``target`` in one step.

    Every process enters and may write; the first one makes the exchange. After an error, or a kill at any moment,
    ``target`` is what it was.

    Args:
        target: the directory.
        accelerator: of the training.
        checkpoints: directory whose last checkpoint is named where the files cannot be written; by default the one
            that ``target`` is in.

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
    except Exception as error:
        shutil.rmtree(staging.parent, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, CheckpointError) else error  # of a save within this one
        if isinstance(cause, ShadowtuneError) or not isinstance(cause, Exception):
            raise
        if not is_write_error(cause) and not isinstance(cause, RuntimeError):  # torch.save's for a full disk
            raise
        raise CheckpointError(
            f"cannot write {target}: {write_reason(cause)}; {kept(checkpoints or target.parent)}"
        ) from error
    accelerator.wait_for_everyone()


@contextmanager
def writing_run(run: Path, checkpoints: Path) -> Iterator[None]:
    """Context in which a file of a run that cannot be written, such as its log on a full disk, ends in one line.

    Raises:
        TrainingError: naming the last checkpoint.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ShadowtuneError):
            raise
        message = f"cannot write to {error.filename or run}: {write_reason(error)}; {kept(checkpoints)}"
        raise TrainingError(message) from error


def kept(checkpoints: Path) -> str:
    """Say which checkpoint a run can go on from."""
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is None:
        return "no checkpoint was saved before"
    return f"checkpoints saved before are kept, --resume goes on from {last}"


def write_files(checkpoint: Path) -> None:
    """Record the names and contents of all files of a checkpoint that is about to be finished."""
    digests = {str(path.relative_to(checkpoint)): _digest(path) for path in _files_of(checkpoint)}
    (checkpoint / FILES).write_text(json.dumps(digests, indent=2) + "\n")


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
    """Compare every file of a checkpoint with what was written.

    Raises:
        CheckpointError: naming the first file that is missing or differs, and how to go on without this checkpoint.
    """
    for name, digest in check_complete(checkpoint).items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            raise _damaged(checkpoint / name, checkpoint, error.strerror) from None
        if found != digest:
            raise _damaged(checkpoint / name, checkpoint, f"its contents are not those recorded in {FILES}")


def check_complete(checkpoint: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's files by name; raises CheckpointError if one of the files is missing."""
    try:
        digests: Any = json.loads((checkpoint / FILES).read_text())
        names = {str(path.relative_to(checkpoint)) for path in _files_of(checkpoint)}
        missing = sorted(digests.keys() - names)
    except FileNotFoundError:
        digests, missing = {}, [FILES]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(checkpoint / FILES, checkpoint, error) from None
    if missing:
        raise CheckpointError(
            f"{checkpoint / missing[0]} is missing; delete {checkpoint} to resume from the one before it"
        )
    return dict(digests)


def _files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / FILES)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while piece := handle.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _damaged(path: Path, checkpoint: Path, error: Any) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path} is damaged ({reason}); delete {checkpoint} to resume from the one before it")
