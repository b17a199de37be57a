"""Tables for people, one JSON object for programs."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shadowtune.errors import ShadowtuneError
from shadowtune.tables import format_value


def check_json_target(file: str | None) -> None:
    """Raise ShadowtuneError now, not after an hour's work, if ``--json FILE`` cannot be written."""
    if file is None:
        return
    parent = Path(file).absolute().parent
    if Path(file).is_dir():
        raise ShadowtuneError(f"--json {file} is a directory; name a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ShadowtuneError(f"--json {file}: {parent} is not a writable directory")


def write_json(file: str | Path | None, command: str, rows: Sequence[dict[str, Any]], **extra: Any) -> None:
    """Write ``{"schema": 1, "command": ..., "provenance": {...}, "rows": [...]}`` whole or not at all."""
    if file is None:
        return
    from shadowtune.provenance import provenance

    document = {"schema": 1, "command": command, "provenance": provenance(), "rows": list(rows), **extra}
    target = Path(file)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(scratch, target)


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print flat rows as a table; the keys of the first row are its columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, key in enumerate(rows[0]):
        table.add_column(key.replace("_", " "), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(format_value(value) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)


def say(line: str) -> None:
    """Print a line for the user, beside the progress bars rather than into the results."""
    print(line, file=sys.stderr, flush=True)


class ProgressBar:
    """A bar with the time left, on standard error; a context manager that takes it down at its end."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=Console(stderr=True), disable=quiet)
        self._task: Any = None

    def show(self, what: str, done: int, total: int) -> None:
        """Say what is being done, how much of it is done, and of how much."""
        if self._task is None:
            self._task = self._progress.add_task(what, total=total)
        self._progress.update(self._task, description=what, completed=done, total=total)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
