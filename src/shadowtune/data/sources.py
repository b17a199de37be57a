"""Load the rows of a data set: from local files, from the data set in this package, or from the Hugging Face Hub.

Also the train/validation/test split of a data set that has none of its own, and the shares of several sources.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.config.data import HOLD_OUT_SHARE
from shadowtune.config.settings import nearest
from shadowtune.data.files import SUFFIXES, check_encoding, has_lines, import_datasets, read_file, read_table
from shadowtune.errors import DataError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python >= 3.11

SHIPPED = {"clinc150-demo": "clinc150"}
"""Data sets in the package: name -> folder of this package that holds SPLIT.jsonl.gz."""
HUB = "hub:"
"""Prefix of data sets on the Hugging Face Hub."""
_ONE_SET, _SETS = "state.json", "dataset_dict.json"
"""Files that ``save_to_disk`` of ``datasets`` writes into a directory of one set, and into one of several splits."""


class Row(dict[str, Any]):
    """The fields of one row of a file or data set, with its origin.

    Attributes:
        number: line in the file, or number in the data set, from 1.
        origin: the file or data set.
        unit: "line" or "row", what ``number`` counts.
        classes: class names of the fields that store the number of a class.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        origin: str,
        number: int,
        unit: str = "line",
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(fields)
        self.origin = origin
        self.number = number
        self.unit = unit
        self.classes = classes or {}

    def with_fields(self, fields: Mapping[str, Any], classes: Mapping[str, Sequence[str]] | None = None) -> "Row":
        """Return a row of the same origin with other fields."""
        return Row(fields, self.origin, self.number, self.unit, self.classes if classes is None else classes)


def row_number(row: Mapping[str, Any], index: int) -> int:
    """Return the line or number of a row, or ``index`` + 1 if it has none."""
    return row.number if isinstance(row, Row) else index + 1


def row_location(row: Mapping[str, Any], index: int) -> str:
    """Name a row for error messages: "FILE, line N", or "row N" if its file is unknown."""
    return f"{row.origin}, {row.unit} {row.number}" if isinstance(row, Row) else f"row {index + 1}"


def load_rows(source: str, split: str, limit: int | None = None, encoding: str = "utf-8") -> list[Row]:
    """Load the rows of a data set.

    Args:
        source: a data set in this package ("clinc150-demo"), a Hub data set ("hub:org/name" or "hub:org/name/config"),
            a file of one of ``files.SUFFIXES``, a directory of such files, each named after a split, or a directory of
            ``datasets.save_to_disk``. ":SPLIT" after it overrides ``split``.
        split: "train", "validation", "test" or any other split of the data set; ignored for a single file.
        limit: load only the first ``limit`` rows.
        encoding: of text files.

    Raises:
        DataError: naming file and line, if the source or split is missing, unreadable or empty.
        ShadowtuneError: if the source needs the package ``datasets`` and it is not installed.
    """
    check_limit(limit)
    check_encoding(encoding)
    try:
        loaded = list(islice(_rows(*parse_source(source, split), encoding), limit))
    except OSError as error:  # no permission, a name that is too long
        raise DataError(f"cannot read {source}: {error.strerror}") from None
    if not loaded:
        raise DataError(f"{source} holds no rows; it needs at least one example")
    return loaded


def parse_source(source: str, split: str) -> tuple[str, str]:
    """Return a source without its ":SPLIT", and that split, or ``split`` if it names none."""
    if source.startswith(HUB):
        name, _, own = source.removeprefix(HUB).partition(":")
        return HUB + name, own or split
    name, colon, own = source.rpartition(":")
    if not colon or _path(source).exists() or not (name in SHIPPED or _path(name).exists()):
        return source, split
    if not has_splits(name):
        raise DataError(f"{name} is one set of rows and has no split {own!r}; leave out :{own}")
    return name, own


def _rows(source: str, split: str, encoding: str) -> Iterator[Row]:
    """Yield the rows of a source without a ":SPLIT"."""
    if source.startswith(HUB):
        dataset = _load_hub(source, split)
    elif (path := _path(source)).is_dir() and ((path / _ONE_SET).is_file() or (path / _SETS).is_file()):
        dataset = _load_saved(source, path, split)
    else:
        for file in _find_files(source, split):
            rows, classes = read_file(file, encoding)
            unit = "line" if has_lines(file.name) else "row"
            yield from (Row(fields, str(file), number, unit, classes) for number, fields in rows)
        return
    rows, classes = read_table(dataset, source)
    yield from (Row(fields, source, number, "row", classes) for number, fields in rows)


def check_limit(limit: int | None) -> None:
    """Raise DataError if ``limit`` is below 1."""
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}")


def has_splits(source: str) -> bool:
    """Whether a source has splits; a single file or set has none and is loaded whole for any split."""
    if source.startswith(HUB) or source in SHIPPED:
        return True
    path = _path(source)
    return not path.is_file() and not (path / _ONE_SET).is_file()


def split_rows(rows: Sequence[Row], parts: Sequence[str], part_share: float = HOLD_OUT_SHARE) -> dict[str, list[Row]]:
    """Hold out a share of the distinct rows for each of ``parts``; the others are "train".

    The split depends on the contents of the rows alone, not on their order; equal rows go to the same part.

    Returns:
        The rows of "train" and of each part, in their original order.
    """
    digests = [row_digest(row) for row in rows]
    distinct = sorted(set(digests))
    share = math.ceil(part_share * len(distinct))
    part_of = {digest: parts[number // share] for number, digest in enumerate(distinct[: share * len(parts)])}
    split: dict[str, list[Row]] = {part: [] for part in ("train", *parts)}
    for row, digest in zip(rows, digests, strict=True):
        split[part_of.get(digest, "train")].append(row)
    return split


def weigh_rows(rows: Sequence[Row], weight: float) -> list[Row]:
    """Repeat rows ``weight`` times; of a fraction, take the rows that a fixed order by their contents puts first."""
    whole, part = divmod(weight, 1)
    count = round(part * len(rows))
    chosen = set(sorted(range(len(rows)), key=lambda index: row_digest(rows[index]))[:count]) if count else set()
    return [*rows] * int(whole) + [row for index, row in enumerate(rows) if index in chosen]


def row_digest(row: Row) -> bytes:
    """SHA-256 of a row's fields; its origin and number do not count."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path.expanduser raises at unknown users


def _find_files(source: str, split: str) -> "list[Traversable]":
    path = _path(source)
    if source in SHIPPED:
        return _find_split(source, resources.files("shadowtune.data").joinpath(SHIPPED[source]), split)
    if path.is_dir():
        return _find_split(source, path, split)
    if not path.exists():
        raise DataError(
            f"there is no data at {source}: it is no file, no directory, and none of the data sets in this package "
            f"({', '.join(SHIPPED)}){nearest(source, SHIPPED)}; a data set on the Hub is written hub:org/name"
        )
    if not path.name.endswith(SUFFIXES):
        hint = "; save the sheet as CSV" if path.suffix in (".xlsx", ".xls", ".ods") else ""
        raise DataError(
            f"cannot read {source}: its name must end in .jsonl, .json, .csv, .tsv, .txt (each may be followed by .gz "
            f"or .zst), .parquet or .arrow{hint}"
        )
    return [path]


def _find_split(source: str, folder: "Traversable", split: str) -> "list[Traversable]":
    """Return the files of a split: SPLIT.SUFFIX or its shards SPLIT-00000-of-00002.SUFFIX, here or below ``data``."""
    files: dict[str, dict[str, list[Any]]] = {}
    below = folder.joinpath("data")
    for file in [*folder.iterdir(), *(below.iterdir() if below.is_dir() else ())]:
        suffix = next((each for each in SUFFIXES if file.name.endswith(each)), None)
        if suffix is not None:
            name = re.sub(r"-\d{5}-of-\d{5}$", "", file.name.removesuffix(suffix))
            files.setdefault(name, {}).setdefault(suffix, []).append(file)
    if split in files:
        suffix = min(files[split], key=SUFFIXES.index)
        return sorted(files[split][suffix], key=lambda file: file.name)
    known = ", ".join(sorted(files)) or "none"
    hint = "; a directory holds a file for each split, such as train.jsonl" if not files else ""
    raise DataError(f"{source} has no split {split!r}{nearest(split, files)}; it has {known}{hint}")


def _load_saved(source: str, path: Path, split: str) -> Any:
    """Load one set that ``save_to_disk`` wrote, with the given split if there are several."""
    datasets = import_datasets(source)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {source}: {' '.join(str(error).split())}; save it again") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{source} has no split {split!r}{nearest(split, saved)}; it has {', '.join(sorted(saved))}")
    return saved[split]


def _load_hub(source: str, split: str) -> Any:
    datasets = import_datasets(source)
    parts = source.removeprefix(HUB).split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{source} is not of the form hub:org/name or hub:org/name/config")
    try:
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except (OSError, ValueError) as error:  # not found, no connection, no such config or split
        reason = " ".join(str(error).split())
        raise DataError(f"cannot load {source}, split {split!r}: {reason}") from None
