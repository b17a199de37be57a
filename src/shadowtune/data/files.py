"""Read the rows of one file: JSON, CSV, TSV and plain text by themselves, Parquet and Arrow through ``datasets``.

A cell of CSV and TSV is text, or None if it is empty; the first line names the columns. Text files may be compressed.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from shadowtune.errors import DataError, ShadowtuneError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python >= 3.11

TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Suffixes of text files: JSON with one object per line or one array, tables with a header, and one plain text."""
TABLE_KINDS = (".parquet", ".arrow")
SUFFIXES = (*(kind + packed for kind in TEXT_KINDS for packed in ("", ".gz", ".zst")), *TABLE_KINDS)
"""Suffixes of all files that can be read; of several files for one split the first in this order is read."""
MAX_COLUMNS = 10_000
"""Most columns of a table; one with more is transposed, or no table of examples."""
Rows = Iterator[tuple[int, dict[str, Any]]]
"""Numbers of lines or rows, from 1, and their fields."""


def has_lines(name: str) -> bool:
    """Whether rows of a file are counted by its lines."""
    return not name.endswith((".parquet", ".arrow"))


def read_file(file: "Traversable", encoding: str) -> tuple[Rows, dict[str, list[str]]]:
    """Read a file by its suffix.

    Args:
        file: its name ends in one of ``SUFFIXES``.
        encoding: of text, a name that Python knows.

    Returns:
        The rows, and the class names of those columns that store the number of a class.

    Raises:
        DataError: naming the file, the line and a hint, while the rows are read.
        ShadowtuneError: if the file needs a package that is not installed.
    """
    kind = file.name.removesuffix(".gz").removesuffix(".zst")
    if kind.endswith(TABLE_KINDS):
        return read_table(_arrow_table(file), str(file))
    lines = _lines(file, encoding)
    if kind.endswith((".csv", ".tsv")):
        return _read_csv(lines, str(file), "\t" if kind.endswith(".tsv") else None), {}
    return (_read_text(lines) if kind.endswith(".txt") else _read_json(lines, str(file))), {}


def check_encoding(encoding: str) -> None:
    """Raise DataError if Python has no such text encoding."""
    try:
        "".encode(encoding)
    except LookupError:
        raise DataError(f"data.encoding {encoding!r} is unknown; common are utf-8, utf-16, cp1252, latin-1") from None


def import_datasets(what: str) -> Any:
    """Return the package ``datasets``; raises ShadowtuneError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ShadowtuneError(f"{what} needs the library datasets: pip install 'shadowtune[hub]'") from None
    return datasets


def read_table(dataset: Any, where: str) -> tuple[Rows, dict[str, list[str]]]:
    """Read a ``datasets.Dataset``; keys without a value inside of nested fields, which Arrow adds, are left out."""
    check_columns(dataset.column_names, where)
    datasets, names = import_datasets(where), {}
    for column, feature in dataset.features.items():
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)
    fields = ({name: _without_nulls(value) for name, value in row.items()} for row in dataset)
    return enumerate(fields, start=1), names


def check_columns(columns: Iterable[Any], where: str) -> None:
    """Raise DataError if a table has too many columns, or two of the same name."""
    names = list(columns)
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{where}: {len(names):,} columns, more than {MAX_COLUMNS:,}; rows are examples and columns their fields: "
            "transpose the table, or keep only the columns to learn from"
        )
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"{where}: the column {twice!r} comes twice; rename one of them")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _arrow_table(file: "Traversable") -> Any:
    """Open a Parquet file, or an Arrow file of either format, as a ``datasets.Dataset`` with its features."""
    datasets = import_datasets(str(file))
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.name.endswith(".parquet"):
            return datasets.Dataset(parquet.read_table(str(file)))
        with open(str(file), "rb") as opened:
            open_table = ipc.open_file if opened.read(6) == b"ARROW1" else ipc.open_stream
        with pyarrow.OSFile(str(file)) as opened:
            return datasets.Dataset(open_table(opened).read_all())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise DataError(f"cannot read {file}: {reason}; it may be damaged or of another kind") from None


@contextlib.contextmanager
def _opened(file: "Traversable") -> Iterator[BinaryIO]:
    with file.open("rb") as raw:
        if file.name.endswith(".gz"):
            with gzip.open(raw) as lines:
                yield cast(BinaryIO, lines)
        elif file.name.endswith(".zst"):
            try:
                import pyarrow
            except ImportError:
                raise ShadowtuneError(f"{file} needs pyarrow to decompress: pip install 'shadowtune[hub]'") from None
            yield cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")))
        else:
            yield cast(BinaryIO, raw)


def _raw_lines(file: "Traversable") -> Iterator[bytes]:
    number = 0
    try:
        with _opened(file) as lines:
            for line in lines:
                number += 1
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{file}, after line {number}: the gzip file is damaged or cut short") from None
    except OSError as error:
        if file.name.endswith(".zst") and error.errno is None:  # Arrow's
            raise DataError(f"{file}, after line {number}: the zst file is damaged or cut short") from None
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _lines(file: "Traversable", encoding: str) -> Iterator[str]:
    """Yield lines with their ends; only LF ends one. The byte order mark of files from Windows is left out."""
    if codecs.lookup(encoding).name != "utf-8":
        raw = b"".join(_raw_lines(file))
        try:
            yield from io.StringIO(raw.decode(encoding).removeprefix("\ufeff"), newline="\n")
        except UnicodeDecodeError as error:
            ends = raw.count(b"\n", 0, error.start)
            raise DataError(
                f"{file}, line {ends + 1}: not {encoding} text at byte {error.start:,}; correct data.encoding"
            ) from None
        return
    offset = 0
    for number, line in enumerate(_raw_lines(file), start=1):
        try:
            if number == 1:
                _refuse_utf16(line, str(file))
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:  # of the line without a byte order mark
            wrong, before = error.object[error.start], error.object[: error.start].decode("utf-8", "replace")
            start = offset + len(line) - len(error.object) + error.start
            raise DataError(
                f"{file}, line {number}: not UTF-8 text at byte {start:,} (0x{wrong:02x} after {before[-20:]!r}); if "
                "it comes from Windows or Excel set data.encoding=cp1252, or save it as UTF-8"
            ) from None
        offset += len(line)


def _refuse_utf16(line: bytes, where: str) -> None:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{where}, line 1: not UTF-8 text but UTF-16, by its first two bytes; set data.encoding=utf-16, or save it "
            "as UTF-8"
        )
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(line) > 3 and not any(line[start : start + 40 : 2]):
            raise DataError(
                f"{where}, line 1: not UTF-8 text but UTF-16, every second byte is 0; set data.encoding={name}"
            )


def _read_text(lines: Iterator[str]) -> Rows:
    """Yield the whole text as a single row, unless it is blank; CRLF becomes LF."""
    text = "".join(lines).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _read_json(lines: Iterator[str], where: str) -> Rows:
    """Yield (line, object) of each line that is not blank, or the objects of one array, counted from 1."""
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        first, begins = False, first
        if begins and line.lstrip().startswith("["):
            yield from _read_array(line + "".join(lines), where)
            return
        here = f"{where}, line {number}"
        yield number, _object(_parse(line, here, "a line must hold one object, or the file one array"), here)


def _read_array(text: str, where: str) -> Rows:
    values = _parse(text, where, "the file must hold one array of objects")
    for number, value in enumerate(values, start=1):
        yield number, _object(value, f"{where}, object {number} of the array")


def _parse(text: str, where: str, form: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair would crash the tokenizer
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise DataError(f"{where}: not JSON ({error.msg}, {line}column {error.colno}); {form}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: a number is too long or the nesting too deep") from None
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a JSON {type(value).__name__}, not an object such as {{"prompt": ...}}')
    return value


def _read_csv(lines: Iterator[str], where: str, delimiter: str | None) -> Rows:
    """Yield (line where the row begins, cells by column); a row of another number of cells is an error."""
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    reader = csv.reader(chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    begin, header = 1, None
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not any(cells):
                continue
            if header is None:
                header = [name.strip() or f"column {index}" for index, name in enumerate(cells, start=1)]
                check_columns(header, f"{where}, line 1")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}, line {line}: {len(cells)} cells, but the first line names {len(header)} columns; put "
                    "quotes around a cell that holds the separator"
                )
            yield line, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        hint = "a quote that is not closed begins there, or the cell is too large: write it as JSONL"
        if "new-line" in str(error):
            hint = "its lines end in CR alone: save it with line ends LF or CRLF"
        raise DataError(f"{where}, line {begin}: no table ({error}); {hint}") from None


def _delimiter(header: str) -> str:
    """Return the separator of the most columns of a header: comma, semicolon (of Excel in some languages) or tab."""
    return max(",;\t", key=lambda each: _width(header, each))


def _width(header: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=delimiter), []))
    except csv.Error:  # one cell of more than 128 KB
        return 1


def named_columns(row: Mapping[str, Any]) -> str:
    """Name the columns of a row for a message: the first ten, and how many there are."""
    names = list(map(repr, row))
    rest = f", ... ({len(names):,} in all)" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "no fields") + rest
