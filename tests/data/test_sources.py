import gzip
import importlib.resources
import json
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.sources import has_splits, load_rows
from shadowtune.errors import DataError, ShadowtuneError
from tests.support.properties import property_test

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "zwei ü", "completion": "2"}, {"prompt": "three", "n": [3]}]


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refuse(source, message, split="train", **arguments):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(source), split, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_a_file_of_one_object_a_line_plain_or_gzipped(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines()) if name.endswith(".gz") else lines())
    rows = load_rows(str(path), "whatever")
    assert rows == ROWS
    assert [row.number for row in rows] == [1, 2, 3]
    assert {row.origin for row in rows} == {str(path)}


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n   \n{"a": 2}')
    rows = load_rows(str(path), "train")
    assert rows == [{"a": 1}, {"a": 2}]
    assert [row.number for row in rows] == [2, 4]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines())
    assert load_rows(str(path), "train") == ROWS


def test_line_separators_inside_text_do_not_end_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"text": "a\u2028b\x85c"}]))
    assert load_rows(str(path), "train") == [{"text": "a\u2028b\x85c"}]


def test_the_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines() + b"not json\n")
    assert load_rows(str(path), "train", limit=2) == ROWS[:2]
    assert load_rows(str(path), "train", limit=3) == ROWS
    refuse(path, "line 4: not JSON", limit=4)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_rows_is_refused(limit):
    refuse("clinc150-demo", f"limit of rows must be at least 1, got {limit}", limit=limit)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"a": 1', r"line 2: not JSON \(Expecting ',' delimiter, column"),
        (b'{"a": 1} {"a": 2}', r"line 2: not JSON \(Extra data"),
        (b"[1, 2]", "line 2: a JSON list, not an object"),
        (b'"text"', "line 2: a JSON str, not an object"),
        (b"null", "line 2: a JSON NoneType, not an object"),
        (b'{"a": "caf\xe9"}', "line 2: not UTF-8 text"),
        (b'{"a": "\\ud83d"}', "line 2: holds half of a surrogate pair"),
        (b'{"\\uDE00": 1}', "line 2: holds half of a surrogate pair"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 2: a number is too long"),
        (b"[" * 100_000, "line 2: a number is too long or the nesting too deep"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, second, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + second + b"\n")
    assert str(path) in refuse(path, message)


def test_whole_surrogate_pairs_are_characters(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert load_rows(str(path), "train") == [{"a": "😀"}]


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert str(path) in refuse(path, "holds no rows")


def test_gzip_files_that_are_cut_damaged_or_none_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(lines([{"text": str(number)} for number in range(2000)]), mtime=0)
    for damaged in (whole[:-4], whole[: len(whole) // 2], whole[:200] + bytes(8) + whole[208:], lines()):
        path.write_bytes(damaged)
        assert str(path) in refuse(path, "the gzip file is damaged or cut short")


def test_other_kinds_of_files_are_refused(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("a,b\n")
    refuse(path, r"cannot read .*rows\.xlsx: its name must end in \.jsonl.*; save the sheet as CSV")


def test_missing_files_say_what_a_source_can_be(tmp_path):
    message = refuse(tmp_path / "none.jsonl", "there is no data at")
    assert "clinc150-demo" in message
    assert "hub:org/name" in message


def test_a_shipped_name_with_a_typo_gets_the_right_one():
    refuse("clinc150_demo", r"\(did you mean clinc150-demo\?\)")


def test_a_directory_holds_a_file_for_each_split(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(lines(ROWS[1:])))
    (tmp_path / "notes.md").write_text("other files do not matter")
    assert load_rows(str(tmp_path), "train") == ROWS[:1]
    assert load_rows(str(tmp_path), "test") == ROWS[1:]
    refuse(tmp_path, r"no split 'tests' \(did you mean test\?\); it has test, train$", split="tests")


@pytest.mark.parametrize("name", ["story.txt", "story.txt.gz"])
def test_a_plain_text_is_one_row(tmp_path, name):
    path, text = tmp_path / name, "Once.\n\n  zwei ü\u2028{no JSON}\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (row,) = load_rows(str(path), "whatever", limit=1)
    assert row == {"text": text}
    assert (row.origin, row.number) == (str(path), 1)


def test_a_plain_text_from_windows_reads_as_any_other(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n")
    assert load_rows(str(path), "train") == [{"text": "one\ntwo\rthree\n"}]


def test_a_plain_text_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    assert str(path) in refuse(path, "line 2: not UTF-8 text")
    path.write_bytes(b" \n\n")
    assert str(path) in refuse(path, "holds no rows")


def test_a_directory_may_hold_plain_texts(tmp_path):
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress(b"two"))
    assert load_rows(str(tmp_path), "train") == [{"text": "one"}]
    assert load_rows(str(tmp_path), "test") == [{"text": "two"}]
    refuse(tmp_path, "it has test, train$", split="dev")


def test_a_directory_without_rows_has_no_splits(tmp_path):
    refuse(tmp_path, "no split 'train'; it has none")


def test_paths_may_start_at_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(lines())
    assert load_rows("~/rows.jsonl", "train") == ROWS
    refuse("~nobody-of-this-name/rows.jsonl", "there is no data at")


def test_only_single_files_have_no_splits(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines())
    assert not has_splits(str(tmp_path / "rows.jsonl"))
    assert has_splits(str(tmp_path))
    assert has_splits("clinc150-demo")
    assert has_splits("hub:org/name")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@property_test
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), min_size=1), ascii_only=st.booleans()
)
def test_what_json_writes_is_read_back(tmp_path, rows, ascii_only):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8", newline=""
    )
    assert load_rows(str(path), "train") == rows


@property_test
@given(st.binary() | st.binary().map(lambda content: b'{"a": 1}\n' + content))
def test_no_file_ends_in_anything_but_rows_or_a_data_error(tmp_path, content):
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.txt.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            assert load_rows(str(path), "train")
        except DataError:
            continue


class TestShippedData:
    splits = {"train": (2000, 100, 500), "validation": (340, 20, 40), "test": (570, 30, 120)}
    folder = importlib.resources.files("shadowtune.data").joinpath("clinc150")

    @pytest.mark.parametrize("split", splits)
    def test_has_fifteen_intents_and_out_of_scope(self, split):
        total, each, outside = self.splits[split]
        rows = load_rows("clinc150-demo", split)
        assert all(set(row) == {"prompt", "completion"} and row["prompt"].strip() for row in rows)
        counts = Counter(row["completion"] for row in rows)
        assert len(rows) == total
        assert counts.pop("out of scope") == outside
        assert len(counts) == 15
        assert set(counts.values()) == {each}
        assert not any("_" in name for name in counts)

    def test_no_request_is_in_two_splits_or_twice_in_one(self):
        requests = [row["prompt"] for split in self.splits for row in load_rows("clinc150-demo", split)]
        assert len(set(requests)) == len(requests) == 2910

    @pytest.mark.parametrize("split", splits)
    def test_the_first_rows_are_a_sample_of_all(self, split):
        total, each, outside = self.splits[split]
        counts = Counter(row["completion"] for row in load_rows("clinc150-demo", split, limit=total // 4))
        assert len(counts) == 16
        assert abs(counts["out of scope"] - outside / 4) < outside / 8
        assert max(counts.values()) <= max(each, outside) / 2

    def test_attribution_travels_with_it(self):
        text = self.folder.joinpath("README.md").read_text(encoding="utf-8")
        for needed in ("Larson", "CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/", "clinc/oos-eval"):
            assert needed in text
        assert "What was changed" in text

    def test_files_are_reproducible_archives(self):
        for split in self.splits:
            header = self.folder.joinpath(f"{split}.jsonl.gz").read_bytes()[:8]
            assert header[3] == 0, "no file name"
            assert header[4:8] == bytes(4), "no time"

    def test_its_folder_is_package_data(self):
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        assert '"data/clinc150/*"' in text


class TestHub:
    def test_without_the_library_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ShadowtuneError, match=r"pip install 'shadowtune\[hub\]'"):
            load_rows("hub:org/name", "train")

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("hub:org/name", ("org/name",)),
            ("hub:org/name/config", ("org/name", "config")),
            ("hub:imdb", ("imdb",)),
        ],
    )
    def test_name_config_and_split_are_passed_on(self, monkeypatch, source, expected):
        calls = []

        def load(*arguments, split):
            calls.append((arguments, split))
            return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])

        monkeypatch.setattr(datasets, "load_dataset", load)
        rows = load_rows(source, "dev", limit=2)
        assert calls == [(expected, "dev")]
        assert rows == [{"text": "a"}, {"text": "b"}]
        assert [(row.origin, row.number) for row in rows] == [(source, 1), (source, 2)]

    @pytest.mark.parametrize("source", ["hub:", "hub:org/", "hub:/name", "hub:a/b/c/d"])
    def test_malformed_names_are_refused(self, source):
        refuse(source, "is not of the form hub:org/name")

    @pytest.mark.parametrize("error", [ValueError('Unknown split "dev".\nShould be one of x'), ConnectionError("off")])
    def test_what_the_library_says_becomes_one_line(self, monkeypatch, error):
        def load(*arguments, split):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        refuse("hub:org/name", "cannot load hub:org/name, split 'dev': (Unknown split|off)", split="dev")
