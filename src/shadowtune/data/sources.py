"""Rows from files, from the data set we ship, and from the Hugging Face Hub."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.config.checking import nearest
from shadowtune.errors import DataError, ShadowtuneError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python >= 3.11

SHIPPED = {"clinc150-demo": "clinc150"}
"""Data sets in the package: name -> folder of this package that holds SPLIT.jsonl.gz."""
HUB = "hub:"
"""Prefix of data sets on the Hugging Face Hub."""
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
"""Files of one JSON object a line."""
TEXT_SUFFIXES = (".txt", ".txt.gz")
"""Files that are one plain text."""
SUFFIXES = JSON_SUFFIXES + TEXT_SUFFIXES
"""Files we read."""


class Row(dict[str, Any]):
    """The fields of one example, and where they come from.

    Attributes:
        number: the line in the file, or the number in the data set, from 1.
        origin: the file or data set.
    """

    def __init__(self, fields: Mapping[str, Any], origin: str, number: int) -> None:
        super().__init__(fields)
        self.origin = origin
        self.number = number


def number_of(row: Mapping[str, Any], index: int) -> int:
    """Return a row's line or number where it has one, else its place among the others, from 1."""
    return row.number if isinstance(row, Row) else index + 1


def load_rows(source: str, split: str, limit: int | None = None) -> list[Row]:
    """Load the rows of a data set.

    Args:
        source: a data set we ship ("clinc150-demo"), a Hub data set ("hub:org/name" or "hub:org/name/config"), a file
            (.jsonl or .json, one object a line; or .txt, which is a single row with the whole file as its "text"; may
            be gzipped) or a directory of such files, each named after a split.
        split: "train", "validation", "test" or any other that the data set has; a single file has no splits.
        limit: load only the first so many rows.

    Raises:
        DataError: naming file and line, if the source or split does not exist, or the rows are unreadable or none.
        ShadowtuneError: if a Hub data set is asked for and the library for them is not installed.
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
    """Raise DataError if a limit of rows allows none."""
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}")


def has_splits(source: str) -> bool:
    """Say whether a source has splits; a single file has none, ``load_rows`` reads it whole whatever the split."""
    return source.startswith(HUB) or source in SHIPPED or not _path(source).is_file()


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path.expanduser raises at unknown users


def _find_file(source: str, split: str) -> "Traversable":
    """Return the file that holds a split of a shipped data set, a directory or a single file."""
    path = _path(source)
    if source in SHIPPED:
        return _find_split(source, resources.files("shadowtune.data").joinpath(SHIPPED[source]), split)
    if path.is_dir():
        return _find_split(source, path, split)
    if not path.exists():
        raise DataError(
            f"there is no data at {source}: it is no file, no directory, and none of the data sets we ship "
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
    """Yield line numbers from 1 and the objects on those lines, blank lines left out."""
    for number, line in _read_lines(file):
        if line.strip():
            yield number, _parse_line(line, f"{file}, line {number}")


def _read_text(file: "Traversable") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the whole text as the only row, unless it is blank. Line breaks of Windows become plain ones."""
    lines = [_decode(line, f"{file}, line {number}") for number, line in _read_lines(file)]
    text = "".join(lines).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _read_lines(file: "Traversable") -> Iterator[tuple[int, bytes]]:
    """Yield line numbers from 1 and the lines."""
    number = 0
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.name.endswith(".gz") else raw as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{file}, after line {number}: the gzip file is damaged or cut short") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _decode(line: bytes, place: str) -> str:
    """Decode one line; ``place`` names it in errors."""
    try:
        return line.decode("utf-8-sig")  # files from Windows begin with a byte order mark
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    """Parse the object on one line; ``place`` names it in errors."""
    text = _decode(line, place)
    try:
        fields = json.loads(text)
        if b"\\u" in line:
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair would crash the tokenizer
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}); a line must hold one object") from None
    except (ValueError, RecursionError):
        raise DataError(f"{place}: a number is too long or the nesting too deep") from None
    if not isinstance(fields, dict):
        raise DataError(f'{place}: a JSON {type(fields).__name__}, not an object such as {{"prompt": ...}}')
    return fields


def _read_hub(source: str, split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Load a split of a Hub data set."""
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
