"""``shadowtune predict``."""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shadowtune.cli.command import Command, ProgressBar, add_json, check_json_target, print_status, write_json
from shadowtune.cli.generate import read_lines
from shadowtune.cli.source import SOURCE, last_change, open_source
from shadowtune.config.settings import check_range
from shadowtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from shadowtune.data.sources import Row
    from shadowtune.evaluation.prediction import Predictor
    from shadowtune.evaluation.trained_model import TrainedModel

EPILOG = """examples:
  shadowtune predict runs/spam mails.jsonl --out labelled.jsonl
  shadowtune predict runs/tickets tickets.csv --out answers.jsonl --mode detached --max-new-tokens 16
  shadowtune predict spam-small mails.jsonl --column body --as spam --out labelled.jsonl
  shadowtune predict runs/spam --lines < subjects.txt
Each line of the output is a row of the input with the prediction, and of a classifier its probability. If it is
interrupted, the same command continues; the output appears when it is complete.
"""
CHUNK = 8
"""Batches of rows between two writes; within them rows of similar length share a batch."""
COUNTED = 20
"""Largest number of different predictions that are counted on the terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help=SOURCE)
    parser.add_argument(
        "file", nargs="?", default="-", help="rows to label, as in data.train; - (default) is a text in standard input"
    )
    parser.add_argument("--lines", action="store_true", help="each line of standard input is a text of its own")
    parser.add_argument("--out", metavar="FILE", help="new JSONL file (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--column", metavar="NAME", help="column of the text or prompt (default: as in training)")
    parser.add_argument("--as", dest="name", default="prediction", metavar="NAME", help="column of the predictions")
    parser.add_argument(
        "--mode", choices=("attached", "detached", "base"), help="default: attached; of one model alone, its only one"
    )
    parser.add_argument("--split", default="test", help="split of the data set, if it has some (default: test)")
    parser.add_argument("--limit", type=int, help="most rows, the first ones")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of a generated answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Predict every row, write it with its prediction, and count the predictions."""
    check_json_target(arguments.json)
    check_range(arguments, max_new_tokens=(1, None), batch_size=(1, None))
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and (out.is_dir() or (out.exists() and not arguments.overwrite)):
        raise ConfigError(f"{out} exists already; pass --overwrite, or name another --out")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: {out.absolute().parent} is not a directory")
    trained = open_source(arguments.source)
    mode = arguments.mode or trained.modes[0]
    rows = _rows(arguments, trained)
    _check_names(rows, arguments.name)
    from shadowtune.evaluation.prediction import Predictor

    with trained.mode(mode) as model:
        predictor = Predictor(trained, model, arguments.column, arguments.max_new_tokens, arguments.batch_size)
        counts: Counter[str] = Counter()
        with ProgressBar(arguments.quiet or out is None) as bar:
            if out is None:
                _write_rows(predictor, rows, sys.stdout, arguments.name, bar)
            else:
                partial_file = out.with_name(f".{out.name}.{_digest(arguments, mode, rows)}.partial")
                _write_file(predictor, rows, partial_file, arguments.name, bar)
                counts.update(json.dumps(json.loads(line)[arguments.name]) for line in partial_file.open("rb"))
                os.replace(partial_file, out)
    if out is not None:
        print_status(f"{out}: {len(rows):,} rows, predicted by {arguments.source}, {mode}{_shown(counts)}")
    row = {"source": arguments.source, "mode": mode, "rows": len(rows), "out": arguments.out}
    write_json(arguments.json, "predict", [row])
    return 0


def _rows(arguments: argparse.Namespace, trained: "TrainedModel") -> "list[Row]":
    """Return the rows of the file, or of texts in standard input."""
    from shadowtune.data.sources import Row, load_rows
    from shadowtune.evaluation.prediction import usual_column

    if arguments.file != "-":
        if arguments.lines:
            raise ConfigError(f"--lines reads standard input; leave it or {arguments.file} out")
        data = trained.own_data
        encoding = "utf-8" if data is None else data.settings.encoding
        return load_rows(arguments.file, arguments.split, arguments.limit, encoding)
    texts = read_lines() if arguments.lines else [sys.stdin.read()]
    column = arguments.column or usual_column(trained)
    if column is None and trained.prompt_format.fields:
        names = ", ".join(trained.prompt_format.fields)
        raise ConfigError(f"prompts of {arguments.source} have the fields {names}; name a file with these columns")
    rows = [Row({column or "text": text}, "standard input", number) for number, text in enumerate(texts, start=1)]
    return rows[: arguments.limit]


def _check_names(rows: "list[Row]", name: str) -> None:
    """Refuse to write over a column of the rows."""
    for row in rows:
        for column in (name, f"{name}_probability"):
            if column in row:
                raise DataError(f"{row.origin} has a column {column!r} already; name another one with --as")


def _digest(arguments: argparse.Namespace, mode: str, rows: "list[Row]") -> str:
    """Return a name for this work: the model's files, the options and the rows."""
    options = (mode, arguments.column, arguments.name, arguments.max_new_tokens)
    known = [arguments.source, last_change(arguments.source), *options]
    digest = hashlib.sha256(json.dumps(known).encode())
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:12]


def _write_file(predictor: "Predictor", rows: "list[Row]", file: Path, name: str, bar: ProgressBar) -> None:
    """Append the rows that a file does not have yet; a line that was cut short is written anew."""
    file.touch()
    written = file.read_bytes()
    whole = written.rfind(b"\n") + 1
    os.truncate(file, whole)
    done = written[:whole].count(b"\n")
    if done:
        print_status(f"continues after {done:,} rows that were predicted before")
    with file.open("a", encoding="utf-8") as stream:
        _write_rows(predictor, rows, stream, name, bar, done)


def _write_rows(
    predictor: "Predictor", rows: "list[Row]", stream: IO[str], name: str, bar: ProgressBar, done: int = 0
) -> None:
    """Predict the rows from number ``done`` on, a chunk at a time, and write them."""
    size = CHUNK * predictor.batch_size
    for start in range(done, len(rows), size):
        chunk = rows[start : start + size]
        progress = partial(_show, bar, start, len(rows))
        for row, made in zip(chunk, predictor.predict(chunk, progress), strict=True):
            labelled: dict[str, Any] = {**row, name: made.value}
            if made.probability is not None:
                labelled[f"{name}_probability"] = round(made.probability, 6)
            stream.write(json.dumps(labelled, ensure_ascii=False, default=str) + "\n")
        stream.flush()


def _show(bar: ProgressBar, before: int, total: int, done: int, _: int) -> None:
    bar.show("predict", before + done, total)


def _shown(counts: Counter[str]) -> str:
    """Return the number of each prediction, if there are few different ones."""
    if len(counts) > COUNTED:
        return ""
    return "".join(f"\n  {count:>8,}  {value}" for value, count in counts.most_common())


PREDICT = Command(add_arguments, run, EPILOG)
