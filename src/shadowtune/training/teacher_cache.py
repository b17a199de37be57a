"""Rows with what their teacher predicts for them, kept in files, so that no training step has to run the teacher.

``rows-00000256.safetensors`` holds the rows from number 256 on: for each labelled position, row by row, the k most
likely tokens (int32) and their log-probabilities (float32), 8 bytes for each of the k. Its metadata says what they were
made of. A file is whole or absent, so filling that was interrupted goes on where it stopped.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shadowtune.core.head import IGNORE_INDEX
from shadowtune.core.top_tokens import TopTokens
from shadowtune.data.collate import TAUGHT
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import save_readable, writing_into

ROWS = 256
"""Rows of a file: what an interruption costs at most."""
KEPT_IN = (torch.int32, torch.float32)
USED_IN = (torch.int64, torch.float32)


class TaughtRows(Sequence[dict[str, Any]]):
    """Encoded rows, each with its teacher's predictions as the collators take them.

    Args:
        rows: as ``data`` encodes them.
        directory: of the files.
        facts: what the predictions depend on, as words; files made of anything else are refused.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], directory: str | Path, facts: Mapping[str, str]) -> None:
        self.rows = rows
        self.directory = Path(directory)
        self.facts = {**facts, "rows": rows_fingerprint(rows), "rows_in_a_file": str(ROWS)}
        self._ends = [0, *accumulate(len(_labelled(row)) for row in rows)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        """Return a row with its "teacher_tokens" (T, k) int64 and "teacher_log_probabilities" (T, k) float32.

        They are 0 where the next token has no label.
        """
        index = range(len(self.rows))[index]
        row, first = self.rows[index], index - index % ROWS
        kept = slice(*(end - self._ends[first] for end in self._ends[index : index + 2]))
        taught = {}
        with safe_open(self._file(first), framework="pt") as content:
            for name, dtype in zip(TAUGHT, USED_IN, strict=True):
                known = content.get_slice(name)[kept]
                taught[name] = torch.zeros(len(row["labels"]), known.shape[1], dtype=dtype)
                taught[name][_labelled(row)] = known.to(dtype)
        return {**row, **taught}

    @property
    def positions(self) -> int:
        """How many positions the teacher predicts at."""
        return self._ends[-1]

    def missing(self) -> Iterator[int]:
        """Yield the first row of each file that is not there.

        Raises:
            ConfigError: if a file was made of something else.
            CheckpointError: if a file is damaged.
        """
        for first in range(0, len(self.rows), ROWS):
            file = self._file(first)
            if file.exists():
                self._check(file)
            else:
                yield first

    def rows_from(self, first: int) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a file by the number of its first one."""
        return self.rows[first : first + ROWS]

    def write(self, first: int, top: TopTokens) -> None:
        """Write the file of the rows from ``first`` on; ``top`` is (labelled positions, k) of them all.

        Raises:
            CheckpointError: if it cannot be written.
        """
        tensors = {name: part.to("cpu", dtype) for name, part, dtype in zip(TAUGHT, top, KEPT_IN, strict=True)}
        with writing_into(self.directory) as staging:
            save_readable(tensors, staging / self._file(first).name, self.facts)

    def _file(self, first: int) -> Path:
        return self.directory / f"rows-{first:08d}.safetensors"

    def _check(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as content:
                found = content.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete it, and it will be made anew") from None
        others = [
            f"{name} {found.get(name)} and not {fact}" for name, fact in self.facts.items() if found.get(name) != fact
        ]
        if others:
            raise ConfigError(
                f"distillation_cache={self.directory} was filled for another run: it has {', '.join(others)}; "
                "name another directory, or delete this one"
            )


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash the "input_ids" and "labels" of all rows, in their order; a label may also be one class."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            values = array("i", [row[name]] if isinstance(row[name], int) else row[name])
            digest.update(f"{len(values)}:".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def _labelled(row: Mapping[str, Any]) -> list[int]:
    """Positions whose next token is labelled."""
    return [position for position, label in enumerate(row["labels"][1:]) if label != IGNORE_INDEX]
