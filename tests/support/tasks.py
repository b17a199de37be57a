"""Directories of data sets in the layout that the tasks of the package read, with rows made up for a test."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How much is 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "mmlu": {"subject": "sums", "question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
    "squad_v2": {"id": "a", "context": "It is red.", "question": "What colour?", "answers": ["red", "is red"]},
    "sst5": {"text": "good film", "label": 3},
    "news20": {"text": "the puck", "label": 10, "label_name": "rec.sport.hockey"},
    "clinc150": {"text": "hi there", "intent": "greeting"},
    "banking77": {"text": "where is my card?", "label_name": "card_arrival", "label": 12},
}
"""One row of each data set that a directory can hold."""


def write_split(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as gzipped JSON lines, with the directories above them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def numbered(row: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Rows that differ in the field ``number``, which no template names."""
    return [{**row, "number": number} for number in range(count)]


def write_task_data(directory: Path, name: str, count: int = 12) -> None:
    """Write the splits of one data set, ``count`` rows each, in ``directory``."""
    splits = {"mmlu": ("dev", "test")}.get(name, ("train", "validation", "test"))
    for split in splits:
        write_split(directory / name / f"{split}.jsonl.gz", numbered({**ROWS[name], "split": split}, count))
