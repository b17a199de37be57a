"""Load the rows of a data set: from local files, from the data set in this package, or from the Hugging Face Hub.

Also the train/validation/test split of a data set that has none of its own.
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.config.settings import nearest
from shadowtune.errors import DataError, ShadowtuneError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python >= 3.11

SHIPPED = {"clinc150-demo": "clinc150"}
"""Data sets in the package: name -> folder of this package that holds SPLIT.jsonl.gz."""
HUB = "hub:"
"""Prefix of data sets on the Hugging Face Hub."""
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
"""Suffixes of files with one JSON object per line."""
TEXT_SUFFIXES = (".txt", ".txt.gz")
"""Suffixes of files that hold one plain text."""
SUFFIXES = JSON_SUFFIXES + TEXT_SUFFIXES
HOLD_OUT_SHARE = 0.1
"""Share of the distinct rows that ``split_rows`` moves to each hold-out part."""


class Row(dict[str, Any]):
    """The fields of one row of a file or data set, with its origin.

    Attributes:
        number: line in the file, or number in the data set, from 1.
        origin: the file or data set.
    """

    def __init__(self, fields: Mapping[str, Any], origin: str, number: int) -> None:
        super().__init__(fields)
        self.origin = origin
        self.number = number


def row_number(row: Mapping[str, Any], index: int) -> int:
    """Return the line or number of a row, or ``index`` + 1 if it has none."""
    return row.number if isinstance(row, Row) else index + 1


def row_location(row: Mapping[str, Any], index: int) -> str:
    """Name a row for error messages: "FILE, line N", or "row N" if its file is unknown."""
    return f"{row.origin}, line {row.number}" if isinstance(row, Row) else f"row {index + 1}"


def load_rows(source: str, split: str, limit: int | None = None) -> list[Row]:
    """Load the rows of a data set.

    Args:
        source: a data set in this package ("clinc150-demo"), a Hub data set ("hub:org/name" or "hub:org/name/config"),
            a file, optionally gzipped (.jsonl or .json with one object per line; .txt makes a single row with the whole
            file as its "text"), or a directory of such files, each named after a split.
        split: "train", "validation", "test" or any other split of the data set; ignored for a single file.
        limit: load only the first ``limit`` rows.

    Raises:
        DataError: naming file and line, if the source or split is missing, unreadable or empty.
        ShadowtuneError: if the source is a Hub data set and the package ``datasets`` is not installed.
    """
    check_limit(limit)
    if source.startswith(HUB):
        origin, rows = source, _read_hub(source, split)
    else:
        file = _find_file(source, split)
        read = _read_text if file.name.endswith(TEXT_SUFFIXES) else _read_objects
        origin, rows = str(file), read(file)
    loaded = [Row(fields, origin, number) for number, fields in islice(rows, limit)]
    if not loaded:
        raise DataError(f"{origin} holds no rows")
    return loaded


def check_limit(limit: int | None) -> None:
    """Raise DataError if ``limit`` is below 1."""
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}")


def has_splits(source: str) -> bool:
    """Whether a source has splits; a single file has none and is loaded whole for any split."""
    return source.startswith(HUB) or source in SHIPPED or not _path(source).is_file()


def split_rows(rows: Sequence[Row], parts: Sequence[str]) -> dict[str, list[Row]]:
    """Hold out ``HOLD_OUT_SHARE`` of the distinct rows for each of ``parts``; the others are "train".

    The split depends on the contents of the rows alone, not on their order; equal rows go to the same part.

    Returns:
        The rows of "train" and of each part, in their original order.
    """
    digests = [row_digest(row) for row in rows]
    distinct = sorted(set(digests))
    share = math.ceil(HOLD_OUT_SHARE * len(distinct))
    part_of = {digest: parts[number // share] for number, digest in enumerate(distinct[: share * len(parts)])}
    split: dict[str, list[Row]] = {part: [] for part in ("train", *parts)}
    for row, digest in zip(rows, digests, strict=True):
        split[part_of.get(digest, "train")].append(row)
    return split


def row_digest(row: Row) -> bytes:
    """SHA-256 of a row's fields; its origin and number do not count."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path.expanduser raises at unknown users


def _find_file(source: str, split: str) -> "Traversable":
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
        raise DataError(
            f"cannot read {source}: only {', '.join(JSON_SUFFIXES)} with one JSON object a line, and "
            f"{', '.join(TEXT_SUFFIXES)} with plain text can be read"
        )
    return path


def _find_split(source: str, folder: "Traversable", split: str) -> "Traversable":
    files = {file.name: file for file in folder.iterdir() if file.name.endswith(SUFFIXES)}
    for suffix in SUFFIXES:
        if split + suffix in files:
            return files[split + suffix]
    names = sorted({re.split(r"\.(?:json|txt)", name)[0] for name in files})
    raise DataError(f"{source} has no split {split!r}{nearest(split, names)}; it has {', '.join(names) or 'none'}")


def _read_objects(file: "Traversable") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each line that is not blank."""
    for number, line in _read_lines(file):
        if line.strip():
            yield number, _parse_line(line, f"{file}, line {number}")


def _read_text(file: "Traversable") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the whole text as a single row, unless it is blank; CRLF becomes LF."""
    lines = [_decode(line, f"{file}, line {number}") for number, line in _read_lines(file)]
    text = "".join(lines).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _read_lines(file: "Traversable") -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.name.endswith(".gz") else raw as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{file}, after line {number}: the gzip file is damaged or cut short") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # files from Windows begin with a byte order mark
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    text = _decode(line, where)
    try:
        fields = json.loads(text)
        if b"\\u" in line:
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair would crash the tokenizer
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); a line must hold one object") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: a number is too long or the nesting too deep") from None
    if not isinstance(fields, dict):
        raise DataError(f'{where}: a JSON {type(fields).__name__}, not an object such as {{"prompt": ...}}')
    return fields


def _read_hub(source: str, split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise ShadowtuneError(f"{source} needs the library for Hub data sets: pip install 'shadowtune[hub]'") from None
    parts = source.removeprefix(HUB).split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{source} is not of the form hub:org/name or hub:org/name/config")
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except (OSError, ValueError) as error:  # not found, no connection, no such config or split
        reason = " ".join(str(error).split())
        raise DataError(f"cannot load {source}, split {split!r}: {reason}") from None
    return enumerate(rows, start=1)
