"""Where files go: never over anything, and never there before they were checked."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from shadowtune.errors import ShadowtuneError
from shadowtune.model.checkpoint import writing_into


def check_free(target: Path) -> None:
    """Raise ShadowtuneError if a file, or a directory that is not empty, has the name already."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ShadowtuneError(f"{target} exists already; name another --out, or remove it")
    if (above := next(parent for parent in target.absolute().parents if parent.exists())).is_file():
        raise ShadowtuneError(f"{target} cannot be made: {above} is a file")


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Give a folder whose files go into ``directory`` at the end; if anything fails, no new directory is left."""
    made = not directory.exists()
    try:
        with writing_into(directory) as staging:
            yield staging
    finally:
        if made and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
