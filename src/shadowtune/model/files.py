"""Directories that are written atomically, and errors of damaged files in one line.

Two kinds of writing. ``writing_into`` adds files to a directory: they are collected in a temporary directory inside it,
flushed and renamed. ``replace_directory`` exchanges a whole directory for a new one, such as a training checkpoint.
Nothing here imports torch.
"""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shadowtune.errors import CheckpointError, ShadowtuneError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
"""Names of the weights, of the index of weights in shards, and of the config, as transformers writes them."""
TORCH_WRITE_ERRORS = ("inline_container", "iostream error", "PytorchStreamWriter")
"""Parts of the RuntimeErrors of ``torch.save`` when a file ends early; they do not name the reason."""

STAGING, OLD = ".saving", ".old"
"""Directory beside ``target`` in which its replacement is written, and the suffix there of the replaced one."""
_CURRENT_DIRECTORY, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

MAX_BLOCKS = 10_000
"""Largest number of blocks in a config; transformers builds lists of this length before it validates anything."""
MAX_NUMBER = 2**31 - 1
"""Largest value of any other number in a config."""
MAX_MESSAGE = 300
"""Characters kept of another library's error message; some list every architecture."""


@contextlib.contextmanager
def writing_into(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory, and move the files written there into ``directory`` at the end.

    If anything fails before the moves, ``directory`` is as it was. New tensors replace those of an earlier save, in
    shards or not, and ``config.json`` is moved last.

    Raises:
        CheckpointError: if something cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
            yield Path(staging)
            _move_files(Path(staging), directory)
    except Exception as error:  # of any kind: safetensors and tokenizers have their own for a full disk
        if isinstance(error, CheckpointError) or not is_write_error(error):
            raise
        raise CheckpointError(f"cannot write to {directory}: {write_reason(error)}") from error


def _move_files(staging: Path, directory: Path) -> None:
    files = sorted(staging.iterdir(), key=lambda path: (path.name == CONFIG, path.name == INDEX))
    for path in files:
        flush(path)
    names = {path.name for path in files}
    stale: list[Path] = []
    if not names.isdisjoint({WEIGHTS, INDEX}):  # the index is deleted first: without it, nothing reads its shards
        stale = [path for path in (directory / INDEX, *directory.glob("model*.safetensors")) if path.name not in names]
    for path in files:
        if path.name == CONFIG:
            for old in stale:
                old.unlink(missing_ok=True)
        os.replace(path, directory / path.name)
    flush(directory)


def is_write_error(error: Exception) -> bool:
    """Return whether an exception means that a file could not be written.

    Libraries written in Rust report errors of the operating system as other exceptions: safetensors as its own,
    tokenizers as a bare ``Exception``.
    """
    bare = type(error) is Exception and "os error" in str(error)
    return bare or isinstance(error, OSError | SafetensorError)


def write_reason(error: Exception) -> str:
    """Return why a file could not be written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if any(part in str(error) for part in TORCH_WRITE_ERRORS):
        return "a file could not be written to its end; is the disk full?"
    if number := re.search(r"os error (\d+)", str(error)):
        return os.strerror(int(number[1]))
    return " ".join(str(error).split())


def staging_of(target: Path) -> Path:
    """Return the directory in which the replacement of ``target`` is written."""
    return target.parent / STAGING / target.name


def replace_directory(target: Path) -> None:
    """Flush the staging directory of ``target`` to the disk and rename it to ``target``, which is removed.

    On Linux both exchange their names in one step, so that a complete directory has the name at any moment. File
    systems without that step need two renames; ``recover_directory`` completes them after a kill in between.
    """
    staging = staging_of(target)
    old = staging.with_name(staging.name + OLD)
    for path in [*staging.rglob("*"), staging]:
        flush(path)
    if not target.exists():
        os.replace(staging, target)
    elif not exchange(staging, target):
        os.replace(target, old)
        os.replace(staging, target)
    flush(target.parent)
    shutil.rmtree(staging.parent, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Complete a replacement of ``target`` that was killed between its two renames; else do nothing.

    The new directory was flushed before the first rename, so it is used; without it, the old one is restored.
    """
    staging = staging_of(target)
    old = staging.with_name(staging.name + OLD)
    if target.exists() or not old.is_dir():
        return
    os.replace(staging if staging.is_dir() else old, target)
    flush(target.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; return whether the system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(rename(_CURRENT_DIRECTORY, names[0], _CURRENT_DIRECTORY, names[1], _EXCHANGE) == 0)


def flush(path: Path) -> None:
    """Make the operating system write a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any error of making a model from files into a CheckpointError of one line.

    Args:
        what: beginning of the message, such as "cannot read config.json of a directory".

    Raises:
        CheckpointError: for every error that is none of ours.
    """
    try:
        yield
    except ShadowtuneError:
        raise
    # transformers' validation, its model classes and torch raise a dozen kinds of errors, some of them bare Exceptions.
    except Exception as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """Return an error's message as one line of at most ``MAX_MESSAGE`` characters; its class name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def check_numbers(values: Any, what: str, path: str = "") -> None:
    """Refuse numbers in a config that no model has, before memory is allocated for them.

    Raises:
        CheckpointError: naming the key and its value.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_numbers(value, what, f"{path}.{name}" if path else str(name))
    elif isinstance(values, int) and not isinstance(values, bool):
        limit = MAX_BLOCKS if path.endswith(("layers", "n_layer")) else MAX_NUMBER
        if not -MAX_NUMBER <= values <= limit:
            raise CheckpointError(f"{what}: {path} is {values}, more than any model has")
