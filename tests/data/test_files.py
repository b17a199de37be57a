import gzip
import json
import os
import sys

import datasets
import pyarrow
import pytest

from shadowtune.data import files
from shadowtune.data.sources import load_rows, weigh_rows
from shadowtune.errors import DataError, ShadowtuneError

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "zwei ü", "completion": "2"}]
TABLE = 'prompt,completion\n"one, two","say ""hi"""\n\n"two\nlines",2\n'


def refuse(path, message, **arguments):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(path), "train", **arguments)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstandard(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def test_a_table_has_text_cells_with_quotes_lines_and_the_line_where_a_row_begins(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.csv", TABLE)), "train")
    assert rows == [{"prompt": "one, two", "completion": 'say "hi"'}, {"prompt": "two\nlines", "completion": "2"}]
    assert [(row.number, row.unit) for row in rows] == [(2, "line"), (4, "line")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "a;b,c\n1;2,3\n", {"a;b": "1;2", "c": "3"}),
        ("a.csv", "a;b;c\n1;2,5;3\n", {"a": "1", "b": "2,5", "c": "3"}),
        ("a.csv", "a\tb\n1\t2\n", {"a": "1", "b": "2"}),
        ("a.tsv", "a\tb,c,d\n1\t2,3\n", {"a": "1", "b,c,d": "2,3"}),
    ],
)
def test_separators_are_read_off_the_header_of_a_csv(tmp_path, name, text, expected):
    assert load_rows(str(write(tmp_path / name, text)), "train") == [expected]


def test_empty_cells_are_missing_and_the_index_column_of_pandas_gets_a_name(tmp_path):
    assert load_rows(str(write(tmp_path / "a.csv", ",text\r\n0,\r\n")), "train") == [{"column 1": "0", "text": None}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows; it needs at least one example"),
        ("a,b\n", "holds no rows"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the first line names 2 columns; put quotes around"),
        ("a,b\n1\n", "line 2: 1 cells"),
        ("a,b\r1,2\r", "line 1: no table .*line ends LF or CRLF"),
        ("a,a\n1,2\n", "line 1: the column 'a' comes twice; rename one"),
        ('a,b\n1,2\n"x,3\n4,5\n', "line 3: no table .*a quote that is not closed begins there"),
        ("a\n" + "x" * 200_000 + "\n", "line 2: no table .*too large: write it as JSONL"),
        (",".join(f"c{number}" for number in range(20_000)) + "\n", "line 1: 20,000 columns, more than 10,000"),
    ],
)
def test_tables_that_are_none_are_named_with_their_line(tmp_path, text, message):
    refuse(write(tmp_path / "a.csv", text), message)


def test_other_encodings_are_named_with_line_byte_and_the_setting_and_can_be_read(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\nname,Müller\n".encode("latin-1"))
    refuse(path, r"line 2: not UTF-8 text at byte 24 \(0xfc after 'name,M'\); .*data\.encoding=cp1252")
    assert load_rows(str(path), "train", encoding="cp1252")[0]["completion"] == "Müller"
    refuse(
        write(tmp_path / "e.csv", b"\xef\xbb\xbfcaf\xe9\n"), r"line 1: not UTF-8 text at byte 6 \(0xe9 after 'caf'\)"
    )
    path = write(tmp_path / "b.csv", "prompt\tcompletion\nname\tMüller\n".encode("utf-16"))
    refuse(path, r"line 1: not UTF-8 text but UTF-16.*data\.encoding=utf-16")
    assert load_rows(str(path), "train", encoding="utf-16")[0]["completion"] == "Müller"
    refuse(write(tmp_path / "c.csv", "prompt,completion\n".encode("utf-16-le")), r"data\.encoding=utf-16-le")
    refuse(write(tmp_path / "d.jsonl", b'{"a": 1}\n\xff'), "line 2: not ascii text at byte 9", encoding="ascii")
    with pytest.raises(DataError, match=r"data\.encoding 'utf-99' is unknown"):
        load_rows(str(path), "train", encoding="utf-99")


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress, zstandard], ids=["plain", "gz", "zst"])
def test_an_array_of_objects_in_any_packing(tmp_path, pack):
    suffix = {gzip.compress: ".gz", zstandard: ".zst"}.get(pack, "")
    rows = load_rows(str(write(tmp_path / f"a.json{suffix}", pack(json.dumps(ROWS, indent=1).encode()))), "train")
    assert rows == ROWS
    assert [row.number for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n 5]', "object 2 of the array: a JSON int, not an object"),
        (
            '[{"a": 1},\n {"a" 2}]',
            r"not JSON \(Expecting ':' delimiter, line 2, column 7\); the file must",
        ),
        ("[]", "holds no rows"),
        ('{\n "a": 1}', "line 1: not JSON .*a line must hold one object, or the file one array"),
    ],
)
def test_an_array_that_is_none_is_named(tmp_path, text, message):
    refuse(write(tmp_path / "a.json", text), message)


def test_a_damaged_zst_file_and_a_missing_library_are_one_line(tmp_path, monkeypatch):
    refuse(write(tmp_path / "a.jsonl.zst", zstandard(b'{"a": 1}\n' * 99)[:-9]), "zst file is damaged")
    refuse(write(tmp_path / "a.jsonl.zst", b'{"a": 1}\n'), "zst file is damaged")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ShadowtuneError, match=r"needs pyarrow to decompress: pip install 'shadowtune\[hub\]'"):
        load_rows(str(tmp_path / "a.jsonl.zst"), "train")


def saved(tmp_path, rows, **features):
    features = datasets.Features(features) if features else None
    return datasets.Dataset.from_list(rows, features=features)


def test_parquet_arrow_and_saved_data_sets_keep_class_names_and_have_no_keys_that_arrow_added(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}],
            "label": 1,
        },
        {"messages": [{"role": "user", "content": "c"}], "label": None},
    ]
    table = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(str(tmp_path / "sets"))
    arrow = next((tmp_path / "set").glob("*.arrow"))
    with (
        pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.data.schema) as out,
    ):
        out.write_table(table.data.table)
    for source in (tmp_path / "a.parquet", arrow, tmp_path / "file.arrow", tmp_path / "set", tmp_path / "sets"):
        read = load_rows(str(source), "train")
        assert read == rows
        assert [(row.unit, row.number, row.classes) for row in read] == [
            ("row", number, {"label": ["no", "yes"]}) for number in (1, 2)
        ]
    assert load_rows(str(tmp_path / "sets"), "dev") == load_rows(f"{tmp_path}/sets:dev", "train") == rows[1:]
    with pytest.raises(DataError, match="no split 'tests'; it has dev, train"):
        load_rows(str(tmp_path / "sets"), "tests")


def test_damaged_tables_are_one_line(tmp_path):
    refuse(write(tmp_path / "a.parquet", b"PAR1 no"), "cannot read .*it may be damaged")
    refuse(write(tmp_path / "a.arrow", b"ARROW1 no"), "cannot read .*it may be damaged")
    refuse(write(tmp_path / "b.arrow", b""), "cannot read .*it may be damaged")


def test_without_datasets_a_table_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ShadowtuneError, match=r"a\.parquet needs the library datasets: pip install"):
        load_rows(str(write(tmp_path / "a.parquet", b"")), "train")


def test_shards_of_a_split_are_read_in_order_also_below_data(tmp_path):
    (tmp_path / "data").mkdir()
    for number in (1, 0):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.jsonl", f'{{"text": "{number}"}}\n')
    write(tmp_path / "test.csv", "text\nx\n")
    assert load_rows(str(tmp_path), "train") == [{"text": "0"}, {"text": "1"}]
    assert load_rows(f"{tmp_path}:test", "train") == [{"text": "x"}]


def test_a_split_of_a_single_file_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", "text\nx\n")
    with pytest.raises(DataError, match=r"a\.csv is one set of rows and has no split 'dev'; leave out :dev"):
        load_rows(f"{path}:dev", "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "text\nx\n")
    path.chmod(0)
    refuse(path, "cannot read .*Permission denied")


def test_a_weight_repeats_rows_or_takes_a_fixed_part(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.csv", "text\n" + "".join(f"{n}\n" for n in range(10)))), "train")
    assert weigh_rows(rows, 1.0) == rows
    assert weigh_rows(rows, 2.0) == [*rows, *rows]
    part = weigh_rows(rows, 0.3)
    assert len(part) == 3
    assert [row.number for row in part] == sorted(row.number for row in part)
    assert {row["text"] for row in weigh_rows(rows[::-1], 0.3)} == {row["text"] for row in part}
    assert len(weigh_rows(rows, 1.5)) == 15


def test_the_suffixes_are_those_of_the_readers():
    assert {".csv", ".tsv.gz", ".json.zst", ".parquet", ".arrow"} <= {*files.SUFFIXES}
