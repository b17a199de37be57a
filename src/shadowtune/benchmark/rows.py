"""The rows of a result: flat, in one order, with units in the keys."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.ratios import pairwise_ratio
from shadowtune.tables import format_value


@dataclass
class Measured:
    """What is known of one subject in one case."""

    name: str
    trainable_parameters: int
    size: str | None
    peak_memory_mb: float
    """Most memory of a step above that of the loaded subject."""
    samples: list[float] = field(default_factory=list)
    """One for each round, in the benchmark's unit."""
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """What ``Bench.facts`` names."""


def comparison(bench: Bench, case: str, ours: Measured, peer: Measured, context: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row that compares ours with one peer in one case.

    ``ratio`` is the median over the rounds of ours divided by the peer's, ``ratio_low`` and ``ratio_high`` the 10th and
    90th percentile, ``n`` the rounds. ``memory_ratio`` is ours over the peer's too, so the smaller the better.
    """
    sides = (("", ours), ("peer_", peer))
    return {
        "bench": bench.name,
        "case": case,
        "subject": ours.name,
        "peer": peer.name,
        **asdict(pairwise_ratio(ours.samples, peer.samples)),
        "unit": bench.unit,
        bench.unit: statistics.median(ours.samples),
        f"peer_{bench.unit}": statistics.median(peer.samples),
        "memory_ratio": ours.peak_memory_mb / peer.peak_memory_mb if peer.peak_memory_mb > 0 else None,
        "peak_memory_mb": ours.peak_memory_mb,
        "peer_peak_memory_mb": peer.peak_memory_mb,
        "trainable_parameters": ours.trainable_parameters,
        "peer_trainable_parameters": peer.trainable_parameters,
        "size": ours.size,
        "peer_size": peer.size,
        **{f"{prefix}{name}": side.facts[name] for name in bench.facts for prefix, side in sides},
        **context,
    }


def for_people(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose and word what a reader wants of the rows."""
    return [
        {
            "case": row["case"],
            "peer": row["peer"],
            "ratio": row["ratio"],
            "10-90 %": f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            "ours": row[bench.unit],
            "theirs": row[f"peer_{bench.unit}"],
            "memory ratio": row["memory_ratio"],
            "our MB": row["peak_memory_mb"],
            "their MB": row["peer_peak_memory_mb"],
            "they train": row["peer_trainable_parameters"],
            **{
                f"{whose} {name.replace('_mb', ' MB')}": row[f"{prefix}{name}"]
                for name in bench.facts
                for whose, prefix in (("our", ""), ("their", "peer_"))
            },
        }
        for row in rows
    ]


def title(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say under what settings the rows were measured."""
    first = rows[0]
    told = [name for name in bench.context if first[name] is not None]
    settings = ", ".join(f"{name.replace('_', '-')} {first[name]}" for name in told)
    measured = f"{bench.unit.replace('_', ' ')}, median of {first['n']}"
    trained = first["trainable_parameters"]
    budget = f"; we train {trained:,} parameters" if trained else ""
    return f"{bench.name} ({settings}): {measured}{budget}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table whose columns are the keys of the first row."""
    keys = list(rows[0])
    lines = [keys, ["---" if index < 2 else "--:" for index in range(len(keys))]]
    lines += [[format_value(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
