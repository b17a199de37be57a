"""Records of served answers for a draft head: a bounded random sample of them, in memory and in a directory.

A record has the states and token ids of consecutive generated tokens, no text. Every fifth record is held out.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shadowtune.errors import CheckpointError
from shadowtune.model.checkpoint import read_tensors, write_tensors
from shadowtune.model.files import CONFIG, writing_into

HOLD_OUT = 5
"""One of so many records is held out."""


class Record(NamedTuple):
    """T consecutive tokens of one answer."""

    features: Tensor
    """``draft_features`` of the attached model, (T, n) bfloat16."""
    states: Tensor
    """s0, (T, d) bfloat16."""
    tokens: Tensor
    """Ids of the tokens themselves, (T,) int64."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.numel() * part.element_size() for part in self)


class Reservoir:
    """A uniform sample of all records so far that fits a number of bytes (Vitter, 1985, algorithm R).

    Args:
        max_bytes: of all records together.
        seed: of the sample.
    """

    def __init__(self, max_bytes: int, seed: int = 0) -> None:
        self._max_bytes, self._random = max_bytes, random.Random(seed)
        self.training: list[Record] = []
        self.held_out: list[Record] = []
        self.seen = 0
        """Records that were added so far."""

    @property
    def bytes(self) -> int:
        """Bytes of all records."""
        return sum(record.size for record in (*self.training, *self.held_out))

    def add(self, record: Record) -> None:
        """Add a record, or drop it at random; a full reservoir drops another one for it."""
        self.seen += 1
        held_out = self.seen % HOLD_OUT == 0
        records, seen = (self.held_out if held_out else self.training), max(1, self.seen // HOLD_OUT)
        seen = seen if held_out else self.seen - self.seen // HOLD_OUT
        if self.bytes + record.size <= self._max_bytes:
            records.append(record)
        elif records and self._random.randrange(seen) < len(records):
            records[self._random.randrange(len(records))] = record
            while self.bytes > self._max_bytes and len(records) > 1:
                records.pop(self._random.randrange(len(records) - 1))

    def tensors(self) -> dict[str, Tensor]:
        """Return all records as named tensors, for ``save_records``; they are never changed afterwards."""
        tensors = {"seen": torch.tensor(self.seen)}
        for kind, records in (("training", self.training), ("held_out", self.held_out)):
            for index, record in enumerate(records):
                tensors |= {f"{kind}.{index}.{name}": part for name, part in record._asdict().items()}
        return tensors

    def load(self, directory: Path, features: int, states: int) -> None:
        """Read what ``save_records`` wrote.

        Args:
            directory: with the records.
            features: n that the records must have.
            states: d that they must have.

        Raises:
            CheckpointError: if it is damaged, or of another model.
        """
        tensors = read_tensors(str(directory))
        for kind, records in (("training", self.training), ("held_out", self.held_out)):
            count = len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}.")})
            for index in range(count):
                parts = [tensors.get(f"{kind}.{index}.{name}") for name in Record._fields]
                if any(part is None for part in parts):
                    raise CheckpointError(f"{directory} is damaged: record {kind}.{index} is not whole")
                record = Record(*(part for part in parts if part is not None))
                if (record.features.shape[1], record.states.shape[1]) != (features, states):
                    raise CheckpointError(f"{directory} has records of another model")
                records.append(record)
        self.seen = int(tensors["seen"]) if "seen" in tensors else len(self.training) + len(self.held_out)


def save_records(tensors: dict[str, Tensor], directory: Path, origin: Mapping[str, Any]) -> None:
    """Write ``Reservoir.tensors`` and what they are of, atomically; raises CheckpointError if that fails."""
    with writing_into(directory) as staging:
        write_tensors(staging, tensors)
        (staging / CONFIG).write_text(json.dumps(origin, indent=2) + "\n")
