"""Leaderboard: seconds on two cores to 95 % of LoRA's accuracy on CLINC150, attached and detached.

    python benchmarks/leaderboard.py                                               # check every entry and show them
    python benchmarks/leaderboard.py add configs/leaderboard/lora.yaml lora --data DIR    # the first entry is LoRA's
    python benchmarks/leaderboard.py add my.yaml my-name --data DIR optimizer.learning_rate=2e-3

The protocol is fixed. An entry chooses the training settings except base, task and test examples; it counts with the
seconds of its whole training, every stage included, if the trained model reaches the target: 0.95 of the accuracy of
the first entry, LoRA's. The file leaderboard.jsonl only grows: each line holds a digest of the one before it, so a
changed or removed line is found when it is read. On a busy machine the seconds are too long; the load just before the
run is recorded.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shadowtune.cli.command import print_status, print_table
from shadowtune.comparison.job import RowDigests, differences
from shadowtune.config.loading import load_config
from shadowtune.config.settings import check_range, from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, DataError, ShadowtuneError
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.files import writing_into
from shadowtune.provenance import provenance
from shadowtune.training.run import train

FILE = Path(__file__).with_name("leaderboard.jsonl")
PROTOCOL = 1
"""Incremented when entries before and after cannot be compared."""
BASE, TASK, TEST_ROWS, THREADS, SHARE = "smollm2-135m", "clinc150", 500, 2, 0.95
MODES = ("attached", "detached")


@dataclass(frozen=True)
class Score:
    """Accuracy of one mode, with its 95 % interval."""

    accuracy: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, accuracy=(0, 1.000001), low=(0, 1.000001), high=(0, 1.000001))


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard."""

    name: str
    seconds: float
    """Of the whole training."""
    attached: Score
    detached: Score | None
    """None for methods without a detached model."""
    config: dict[str, Any]
    """Training settings that are not defaults."""
    test_digest: str
    """Digest of the test examples."""
    load: float
    """Load average just before the run; 0 on a quiet machine."""
    provenance: dict[str, Any]
    """Commit, versions, hardware, date."""
    previous: str
    """Digest of the line before this one; empty in the first."""
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        """Check the ranges and the training settings."""
        check_range(self, seconds=(1e-9, None), load=(0, None), protocol=(PROTOCOL, PROTOCOL + 1))
        if not self.name.strip():
            raise ConfigError("name must not be empty")
        check_protocol(from_mapping(TrainConfig, self.config, "config"))

    def score(self, mode: str) -> Score | None:
        """Return the score of a mode."""
        return {"attached": self.attached, "detached": self.detached}[mode]


def check_protocol(config: TrainConfig) -> None:
    """Raise ConfigError where training settings are not those of the protocol."""
    errors = []
    if config.model != BASE:
        errors.append(f"model must be {BASE}, got {config.model!r}")
    if config.data.task != TASK:
        errors.append(f"data.task must be {TASK}, got {config.data.task!r}")
    if config.task != "causal_lm":
        errors.append(f"task must be causal_lm, got {config.task}")
    if errors:
        raise ConfigError("; ".join(errors))


def read(file: Path) -> list[Entry]:
    """Read a leaderboard; a missing file is an empty one.

    Raises:
        DataError: naming the line that is malformed or does not follow the one before it.
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
    """Append an entry, atomically.

    Raises:
        DataError: if the file is damaged, or the entry does not belong there.
    """
    entries = read(file)
    lines = file.read_text(encoding="utf-8").splitlines() if entries else []
    entry = replace(entry, previous=_digest(lines[-1]) if lines else "")
    lines.append(json.dumps(asdict(entry), sort_keys=True))
    with writing_into(file.parent) as staging:
        (staging / file.name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        read(staging / file.name)


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def measure(name: str, config: TrainConfig, report: Any = lambda line: None) -> Entry:
    """Follow the protocol: train on two threads, then evaluate each mode on the test examples.

    Args:
        name: of the entry.
        config: training settings; ``output`` is the run directory, which must not hold a run.
        report: called with lines for the user.

    Raises:
        ShadowtuneError: if the settings are not those of the protocol, or training or evaluation fails.
    """
    check_protocol(config)
    digest, count = RowDigests().held_out(config.data, "test", None, TEST_ROWS)
    if count < TEST_ROWS:
        raise DataError(f"task {TASK} has {count} test rows, fewer than the {TEST_ROWS} of the protocol")
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    summary = train(replace(config, samples=0), report=report, quiet=True)  # samples would count as training time
    assert summary is not None
    finished = FinishedRun.open(config.output)
    scores: dict[str, Score | None] = dict.fromkeys(MODES)
    for mode in (mode for mode in MODES if mode in finished.modes):
        result = finished.evaluate(mode, limit=TEST_ROWS)
        scores[mode] = Score(result.accuracy, result.accuracy_low, result.accuracy_high)
    attached = scores["attached"]
    assert attached is not None
    settings = differences(replace(config, output=TrainConfig.output))
    settings["data"].pop("directory", None)  # the location of the data says nothing about its content
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
    return found | {"training_seconds": entry.seconds, "target": target, "load": entry.load}


def main(argv: list[str] | None = None) -> int:
    """Show the leaderboard, or add an entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="the rows; default: leaderboard.jsonl beside this file")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("add", help="run the protocol and add a row")
    add.add_argument("config", help="YAML file with training settings")
    add.add_argument("name", help="of the row")
    add.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    add.add_argument("--data", metavar="DIR", help="directory of local data; default: from the Hub")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "add":
            _add(arguments)
        rows = table(read(arguments.file))
    except ShadowtuneError as error:
        print(f"leaderboard: error: {error}", file=sys.stderr)
        return 2
    if rows:
        print_table("Seconds to 95 % of LoRA's accuracy on CLINC150", rows)
    else:
        print(f"{arguments.file} has no rows")
    return 0


def _add(arguments: argparse.Namespace) -> None:
    names = {entry.name for entry in read(arguments.file)}
    if arguments.name in names:
        raise ShadowtuneError(f"there is a row {arguments.name} already; choose another name")
    overrides = [*arguments.overrides, *([] if arguments.data is None else [f"data.directory={arguments.data}"])]
    config = load_config(TrainConfig, arguments.config, overrides)
    with tempfile.TemporaryDirectory() as directory:
        append(arguments.file, measure(arguments.name, replace(config, output=f"{directory}/run"), print_status))


if __name__ == "__main__":
    sys.exit(main())
