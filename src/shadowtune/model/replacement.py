"""Replacing a directory by another in one step, and finishing a replacement that was killed halfway."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

STAGING = ".saving"
"""Directory, beside the finished ones, in which a new one is written."""
OLD = ".old"
"""Suffix, in ``STAGING``, of the directory that is being replaced."""

_CURRENT_DIRECTORY, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def staging_of(target: Path) -> Path:
    """Return where the directory is written that is to take the place of ``target``."""
    return target.parent / STAGING / target.name


def replace_directory(target: Path) -> None:
    """Flush the staged directory of ``target`` to the disk and give it the name; what had the name is removed.

    On Linux both exchange their names in one step, so that there is a whole directory of the name at any moment. Where
    the file system cannot do that there are two renames, and ``recover_directory`` completes them after a kill.
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
    """Complete a replacement of ``target`` that was killed between its two renames; else, do nothing.

    The new directory had been flushed by then, so it is taken; without it, the old one is put back.
    """
    staging = staging_of(target)
    old = staging.with_name(staging.name + OLD)
    if target.exists() or not old.is_dir():
        return
    os.replace(staging if staging.is_dir() else old, target)
    flush(target.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; return whether the system could."""
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
