"""What every subcommand shares: its declaration, the option ``--json``, tables and progress bars."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowtune.errors import ShadowtuneError
from shadowtune.tables import format_value


@dataclass(frozen=True)
class Command:
    """A subcommand; its name and help are in ``cli.main.COMMANDS``."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Do the work and return the exit code; heavy imports belong inside."""
    epilog: str
    """Examples, shown below the help."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``."""
    parser.add_argument("--json", metavar="FILE", help="also write the result as one JSON object to FILE")


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
    """Write ``{"schema": 1, "command": ..., "provenance": {...}, "rows": [...]}``, completely or not at all."""
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
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_status(line: str) -> None:
    """Print a line to standard error, where the progress bars are, so that standard output has results only."""
    print(line, file=sys.stderr, flush=True)


class ProgressBar:
    """A progress bar with the remaining time, on standard error; a context manager that removes it at its end.

    Where standard error is no terminal, it prints whole lines: at the begin, after each tenth, and at the end.
    """

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
        self._lines = not quiet and not sys.stderr.isatty()
        self._line: tuple[str, int] | None = None
        self._progress = Progress(*columns, *times, console=Console(stderr=True), disable=quiet or self._lines)
        self._task: Any = None

    def show(self, what: str, done: int, total: int) -> None:
        """Show a description, and ``done`` of ``total``."""
        line = (what, 10 * done // max(total, 1))
        if self._lines and line != self._line:
            print_status(f"{what}: {done} of {total}")
            self._line = line
        if self._task is None:
            self._task = self._progress.add_task(what, total=total)
        self._progress.update(self._task, description=what, completed=done, total=total)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
