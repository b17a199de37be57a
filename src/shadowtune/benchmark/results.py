"""The files under ``benchmarks/results``: rows are added, never changed or removed."""

import csv
import fcntl
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.rows import Measured, comparison, for_people, markdown_table, title
from shadowtune.errors import ShadowtuneError
from shadowtune.provenance import PACKAGES

HARDWARE = ("platform", "processor", "cores", "threads", "devices")


def columns(bench: Bench) -> list[str]:
    """Return the columns of a benchmark's CSV file: where the numbers come from, then a row's keys."""
    example = Measured("", 0, None, 1.0, [1.0], dict.fromkeys(bench.facts, 0.0))
    row = comparison(bench, "", example, example, dict.fromkeys(bench.context))
    return ["date", "commit", "python", *PACKAGES, *HARDWARE, *row]


class ResultFiles:
    """``NAME.csv``, which gains a line for each row, and ``NAME.md``, which gains a table for each run.

    Raises:
        ShadowtuneError: if they cannot be written, or the CSV file has other columns. It is made before the work.
    """

    def __init__(self, directory: str | Path, bench: Bench) -> None:
        self.bench = bench
        self.csv = Path(directory) / f"{bench.name}.csv"
        self.markdown = Path(directory) / f"{bench.name}.md"
        self.picture = Path(directory) / f"{bench.name}.png"
        try:
            self.csv.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.csv, self.markdown):
                path.open("a").close()
            with self.csv.open(newline="") as file:
                header = next(csv.reader(file), None)
        except OSError as error:
            raise ShadowtuneError(
                f"cannot write results to {directory}: {error.strerror}; pass another --out"
            ) from None
        if header is not None and header != columns(bench):
            raise ShadowtuneError(
                f"{self.csv} has other columns than this version writes; move it away or pass another --out"
            )

    def add_rows(self, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
        """Append rows to the CSV file, each with its provenance."""
        origin = {name: provenance[name] for name in ("date", "commit", "python", *HARDWARE)}
        origin |= {name: provenance["versions"].get(name) for name in PACKAGES}
        origin["devices"] = "; ".join(provenance["devices"])
        text = io.StringIO()
        writer = csv.DictWriter(text, columns(self.bench), lineterminator="\n")
        with self.csv.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another run may be adding, and only one may write the header
            if os.fstat(file.fileno()).st_size == 0:
                writer.writeheader()
            writer.writerows({**origin, **row} for row in rows)
            file.write(text.getvalue())

    def add_table(self, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
        """Append a table of all rows of a run to the Markdown file."""
        versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
        machine = "; ".join([*provenance["devices"], provenance["processor"], f"{provenance['threads']} threads"])
        origin = f"{provenance['date']}, commit {provenance['commit']}, {machine}; {versions}"
        with self.markdown.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"## {title(self.bench, rows)}\n\n{origin}\n\n{markdown_table(for_people(self.bench, rows))}\n")
