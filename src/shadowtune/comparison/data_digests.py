"""Digests of the rows that runs read, so that results on other rows are never taken for these."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from shadowtune.comparison.job import UNREADABLE
from shadowtune.config.data import DataConfig
from shadowtune.data.dataset import Dataset
from shadowtune.errors import ShadowtuneError


class RowDigests:
    """Reads rows once for each way of asking for them.

    Args:
        held_out: whether held-out rows may be read; their digest is empty where not.
    """

    def __init__(self, held_out: bool = True) -> None:
        self._held_out = held_out
        self._known: dict[str, tuple[str, int]] = {}

    def training(self, data: DataConfig) -> tuple[str, int]:
        """Return the digest of the training rows, and how many there are."""
        return self._digest(f"train {data!r}", lambda: Dataset.open(data).training_rows())

    def validation(self, data: DataConfig) -> tuple[str, int]:
        """Return the same of the validation rows, those that training reads."""
        return self._digest(f"validation {data!r}", lambda: Dataset.open(data).validation_rows() or [])

    def held_out(self, data: DataConfig, split: str, source: str | None, limit: int | None) -> tuple[str, int]:
        """Return the same of held-out rows."""
        if not self._held_out:
            return "", 0
        key = f"held out {data!r} {split} {source} {limit}"
        return self._digest(key, lambda: Dataset.open(data).held_out(split, source, limit))

    def _digest(self, key: str, read: Callable[[], Sequence[Any]]) -> tuple[str, int]:
        if key not in self._known:
            try:
                rows = read()
            except ShadowtuneError:
                self._known[key] = (UNREADABLE, 0)
            else:
                hashed = hashlib.sha256()
                for row in rows:
                    hashed.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
                self._known[key] = (hashed.hexdigest()[:16], len(rows))
        return self._known[key]
