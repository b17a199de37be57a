"""The leaderboard: seconds on two cores to 95 % of LoRA's accuracy on CLINC150, attached and detached.

The protocol is fixed. Whoever enters chooses the training settings, all but base, task and the rows that are answered;
the run counts with the seconds of its whole training, every stage of it, if the trained model reaches the target. The
target is 0.95 of the accuracy of the first row, LoRA's. Rows only grow: each holds a digest of the line before it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shadowtune.comparison.data_digests import RowDigests
from shadowtune.comparison.job import differences
from shadowtune.config.checking import check_range, from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, DataError
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.files import writing_into
from shadowtune.provenance import provenance
from shadowtune.training.run import train

PROTOCOL = 1
"""Raised when rows of before cannot be compared with those of after."""
BASE, TASK, TEST_ROWS, THREADS, SHARE = "smollm2-135m", "clinc150", 500, 2, 0.95
MODES = ("attached", "detached")


@dataclass(frozen=True)
class Score:
    """What a model answered rightly."""

    accuracy: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    def __post_init__(self) -> None:
        """Check that they are shares."""
        check_range(self, accuracy=(0, 1.000001), low=(0, 1.000001), high=(0, 1.000001))


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard."""

    name: str
    seconds: float
    """Of the whole training."""
    attached: Score
    detached: Score | None
    """None for methods that leave nothing to detach."""
    config: dict[str, Any]
    """Training settings that are not defaults."""
    test_digest: str
    """Of the rows that were answered."""
    load: float
    """Processes that wanted a core just before the run began; 0 on a quiet machine."""
    provenance: dict[str, Any]
    """Commit, versions, hardware, date."""
    previous: str
    """Digest of the line before this one; empty in the first."""
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        """Check the ranges, and that the settings are training settings."""
        check_range(self, seconds=(1e-9, None), load=(0, None), protocol=(PROTOCOL, PROTOCOL + 1))
        if not self.name.strip():
            raise ConfigError("name must not be empty")
        check_protocol(from_mapping(TrainConfig, self.config, "config"))

    def score(self, mode: str) -> Score | None:
        """Return the score of a mode."""
        return {"attached": self.attached, "detached": self.detached}[mode]


def check_protocol(config: TrainConfig) -> None:
    """Raise ConfigError where training settings are not those of the protocol."""
    faults = []
    if config.model != BASE:
        faults.append(f"model must be {BASE}, got {config.model!r}")
    if config.data.task != TASK:
        faults.append(f"data.task must be {TASK}, got {config.data.task!r}")
    if config.task != "causal_lm":
        faults.append(f"task must be causal_lm, got {config.task}")
    if faults:
        raise ConfigError("; ".join(faults))


def read(file: Path) -> list[Entry]:
    """Read a leaderboard; no file is an empty one.

    Raises:
        DataError: naming the line that is no row, or that does not follow the one before it.
    """
    if not file.is_file():
        return []
    entries: list[Entry] = []
    previous = ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = from_mapping(Entry, json.loads(line), "")
        except (ValueError, ConfigError) as error:
            raise DataError(f"{file}, line {number}: no row of the leaderboard: {error}") from None
        if entry.previous != previous:
            raise DataError(f"{file}, line {number}: a row before it was changed or removed; rows only grow")
        if entry.name in {earlier.name for earlier in entries}:
            raise DataError(f"{file}, line {number}: there is a row {entry.name} already")
        if entries and entry.test_digest != entries[0].test_digest:
            raise DataError(f"{file}, line {number}: {entry.name} answered other rows than {entries[0].name}")
        entries.append(entry)
        previous = _digest(line)
    return entries


def append(file: Path, entry: Entry) -> None:
    """Add a row at the end, whole or not at all.

    Raises:
        DataError: if the file is damaged, or the row does not belong there.
    """
    entries = read(file)
    lines = file.read_text(encoding="utf-8").splitlines() if entries else []
    entry = dataclasses.replace(entry, previous=_digest(lines[-1]) if lines else "")
    lines.append(json.dumps(asdict(entry), sort_keys=True))
    with writing_into(file.parent) as staging:
        (staging / file.name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        read(staging / file.name)


def measure(name: str, config: TrainConfig, report: Any = lambda line: None) -> Entry:
    """Follow the protocol: train on two threads, then answer the test rows in each mode.

    Args:
        name: of the row.
        config: training settings; the run directory is its ``output``, which must not hold a run.
        report: called with lines for the user.

    Raises:
        ShadowtuneError: one of its kinds, with one line that says what is wrong.
    """
    check_protocol(config)
    digest, count = RowDigests().held_out(config.data, "test", None, TEST_ROWS)
    if count < TEST_ROWS:
        raise DataError(f"task {TASK} has {count} test rows, fewer than the {TEST_ROWS} of the protocol")
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    summary = train(config, report=report, quiet=True)
    assert summary is not None
    finished = FinishedRun.open(config.output)
    scores: dict[str, Score | None] = dict.fromkeys(MODES)
    for mode in (mode for mode in MODES if mode in finished.modes):
        result = finished.evaluate(mode, limit=TEST_ROWS)
        scores[mode] = Score(result.accuracy, result.accuracy_low, result.accuracy_high)
    attached = scores["attached"]
    assert attached is not None
    settings = differences(dataclasses.replace(config, output=TrainConfig.output))
    settings["data"].pop("directory", None)  # where the rows were says nothing of them
    return Entry(
        name, summary.train_seconds, attached, scores["detached"], settings, digest, load, provenance(), previous=""
    )


def table(entries: list[Entry]) -> list[dict[str, Any]]:
    """Return a flat row for each entry, the fastest first: its seconds in each mode that reaches the target."""
    if not entries:
        return []
    target = SHARE * entries[0].attached.accuracy
    rows = [_row(entry, target) for entry in entries]
    return sorted(rows, key=lambda row: (row["attached_seconds"] is None, row["training_seconds"]))


def _row(entry: Entry, target: float) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name}
    for mode in MODES:
        score = entry.score(mode)
        reached = score is not None and score.accuracy >= target
        found[f"{mode}_seconds"] = entry.seconds if reached else None
        found[f"{mode}_accuracy"] = None if score is None else score.accuracy
    found |= {"training_seconds": entry.seconds, "target": target, "load": entry.load}
    return found


def _digest(line: str | Mapping[str, Any]) -> str:
    return hashlib.sha256(str(line).encode()).hexdigest()[:16]
