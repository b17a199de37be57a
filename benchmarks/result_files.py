"""Results of benchmarks: ratios of paired samples, flat rows with units in the keys, and append-only files."""

import csv
import fcntl
import io
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Benchmark
from shadowtune.errors import ShadowtuneError
from shadowtune.evaluation.report import markdown_table
from shadowtune.provenance import PACKAGES

HARDWARE = ("platform", "processor", "cores", "threads", "devices")


@dataclass(frozen=True)
class Ratio:
    """Ours over a baseline's, round by round; the drift of the machine affects both of a pair and cancels."""

    ratio: float
    """Median of the ratios of the rounds."""
    ratio_low: float
    """Their 10th percentile."""
    ratio_high: float
    """Their 90th percentile."""
    n: int
    """Number of rounds."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values lie, with linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def pairwise_ratio(ours: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Divide sample i of ours by sample i of the baseline, and describe the ratios."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    return Ratio(statistics.median(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9), len(ratios))


@dataclass
class Measurement:
    """What was measured of one candidate in one case."""

    name: str
    trainable_parameters: int
    size: str | None
    peak_memory_mb: float
    """Most memory of a step above that of the loaded candidate."""
    samples: list[float] = field(default_factory=list)
    """One for each round, in the benchmark's unit."""
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """Values of ``Benchmark.facts``."""


def comparison(
    bench: Benchmark, case: str, ours: Measurement, baseline: Measurement, context: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the row that compares ours with one baseline in one case.

    ``ratio`` is the median over the rounds of ours divided by the baseline's, ``ratio_low`` and ``ratio_high`` the 10th
    and 90th percentile, ``n`` the rounds. ``memory_ratio`` is ours over the baseline's too, so smaller is better.
    """
    sides = (("", ours), ("baseline_", baseline))
    return {
        "bench": bench.name,
        "case": case,
        "candidate": ours.name,
        "baseline": baseline.name,
        **asdict(pairwise_ratio(ours.samples, baseline.samples)),
        "unit": bench.unit,
        bench.unit: statistics.median(ours.samples),
        f"baseline_{bench.unit}": statistics.median(baseline.samples),
        "memory_ratio": ours.peak_memory_mb / baseline.peak_memory_mb if baseline.peak_memory_mb > 0 else None,
        "peak_memory_mb": ours.peak_memory_mb,
        "baseline_peak_memory_mb": baseline.peak_memory_mb,
        "trainable_parameters": ours.trainable_parameters,
        "baseline_trainable_parameters": baseline.trainable_parameters,
        "size": ours.size,
        "baseline_size": baseline.size,
        **{f"{prefix}{name}": side.facts[name] for name in bench.facts for prefix, side in sides},
        **context,
    }


def readable(bench: Benchmark, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose and name the columns that a reader needs."""
    return [
        {
            "case": row["case"],
            "baseline": row["baseline"],
            "ratio": row["ratio"],
            "10-90 %": f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            "ours": row[bench.unit],
            "theirs": row[f"baseline_{bench.unit}"],
            "memory ratio": row["memory_ratio"],
            "our MB": row["peak_memory_mb"],
            "their MB": row["baseline_peak_memory_mb"],
            "they train": row["baseline_trainable_parameters"],
            **{
                f"{whose} {name.replace('_mb', ' MB')}": row[f"{prefix}{name}"]
                for name in bench.facts
                for whose, prefix in (("our", ""), ("their", "baseline_"))
            },
        }
        for row in rows
    ]


def title(bench: Benchmark, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line with the settings under which the rows were measured."""
    first = rows[0]
    names = [name for name in bench.context if first[name] is not None]
    settings = ", ".join(f"{name.replace('_', '-')} {first[name]}" for name in names)
    measured = f"{bench.unit.replace('_', ' ')}, median of {first['n']}"
    trained = first["trainable_parameters"]
    budget = f"; we train {trained:,} parameters" if trained else ""
    return f"{bench.name} ({settings}): {measured}{budget}"


def columns(bench: Benchmark) -> list[str]:
    """Return the columns of a benchmark's CSV file: provenance, then the keys of a row."""
    example = Measurement("", 0, None, 1.0, [1.0], dict.fromkeys(bench.facts, 0.0))
    row = comparison(bench, "", example, example, dict.fromkeys(bench.context))
    return ["date", "commit", "python", *PACKAGES, *HARDWARE, *row]


class ResultFiles:
    """``NAME.csv``, to which each row is appended, and ``NAME.md``, to which a table of each run is appended.

    Raises:
        ShadowtuneError: on construction, if they cannot be written or the CSV file has other columns.
    """

    def __init__(self, directory: str | Path, bench: Benchmark) -> None:
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
            fcntl.flock(file, fcntl.LOCK_EX)  # another run may be appending, and only one may write the header
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
            file.write(f"## {title(self.bench, rows)}\n\n{origin}\n\n{markdown_table(readable(self.bench, rows))}\n")
