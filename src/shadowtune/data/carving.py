"""Rows for validation or for a test, taken out of the training rows of a data set that has none of its own."""

import hashlib
import json
import math
from collections.abc import Sequence

from shadowtune.data.sources import Row

SHARE = 0.1
"""Share of the distinct rows that becomes another part."""


def digest(row: Row) -> bytes:
    """Hash a row's content, wherever it stands."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()


def carve(rows: Sequence[Row], parts: Sequence[str]) -> dict[str, list[Row]]:
    """Take a share of the distinct rows for each of ``parts``; the rest is "train".

    What goes where is said by the rows' contents alone: equal rows stay together, and their order does not matter.

    Returns:
        The rows of each part and of "train", in the order in which they came.
    """
    digests = [digest(row) for row in rows]
    distinct = sorted(set(digests))
    share = math.ceil(SHARE * len(distinct))
    owner = {each: parts[number // share] for number, each in enumerate(distinct[: share * len(parts)])}
    carved: dict[str, list[Row]] = {part: [] for part in ("train", *parts)}
    for row, each in zip(rows, digests, strict=True):
        carved[owner.get(each, "train")].append(row)
    return carved
