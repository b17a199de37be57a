import csv
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.result_files import ResultFiles, columns
from shadowtune.errors import ShadowtuneError
from tests.benchmarks.test_rows import CONTEXT, LORA, OURS, comparison

TRAIN = BENCHMARKS["train"]
ORIGIN = {
    "date": "2030-01-02T03:04:05+00:00",
    "command": "python -m benchmarks train",
    "commit": "abc-dirty",
    "python": "3.11.7",
    "versions": {"shadowtune": "0.1.0", "torch": "2.13.0", "shadow-peft": "0.1.1"},
    "platform": "Linux",
    "processor": "a processor, with a comma",
    "cores": 2,
    "threads": 2,
    "devices": ["gpu a", "gpu b"],
}
KEPT = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [comparison(TRAIN, case, OURS, LORA, CONTEXT) for case in ("labelled=1", "labelled=0.02")]


def read(files):
    with files.csv.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_row_carries_commit_versions_hardware_and_date(tmp_path):
    files = ResultFiles(tmp_path / "new" / "results", TRAIN)
    files.add_rows(ROWS, ORIGIN)
    first, second = read(files)
    assert (first["case"], second["case"]) == ("labelled=1", "labelled=0.02")
    assert (first["date"], first["commit"], first["torch"]) == (ORIGIN["date"], "abc-dirty", "2.13.0")
    assert (first["processor"], first["devices"]) == ("a processor, with a comma", "gpu a; gpu b")
    assert (first["shadow-peft"], first["peft"]) == ("0.1.1", "")
    assert float(first["ratio"]) == ROWS[0]["ratio"]
    assert list(first) == columns(TRAIN)


def test_rows_and_tables_are_added_and_what_was_there_stays(tmp_path):
    files = ResultFiles(tmp_path, TRAIN)
    files.add_rows(ROWS, ORIGIN)
    files.add_table(ROWS, ORIGIN)
    rows_before, tables_before = files.csv.read_text(), files.markdown.read_text()
    again = ResultFiles(tmp_path, TRAIN)
    again.add_rows(ROWS[:1], {**ORIGIN, "date": "2031"})
    again.add_table(ROWS[:1], {**ORIGIN, "date": "2031"})
    assert files.csv.read_text().startswith(rows_before)
    assert files.markdown.read_text().startswith(tables_before)
    assert [row["date"] for row in read(files)] == [ORIGIN["date"], ORIGIN["date"], "2031"]
    assert files.csv.read_text().count("bench,case") == 1
    assert "2031, commit abc-dirty, gpu a; gpu b; a processor, with a comma; 2 threads" in files.markdown.read_text()


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text("mine,yours\n1,2\n")
    with pytest.raises(ShadowtuneError, match=r"train.csv has other columns.*--out"):
        ResultFiles(tmp_path, TRAIN)
    assert (tmp_path / "train.csv").read_text() == "mine,yours\n1,2\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_results_that_are_kept_can_be_added_to(name):
    file = KEPT / f"{name}.csv"
    if not file.exists():
        pytest.skip("no results yet")
    with file.open(newline="") as kept:
        assert next(csv.reader(kept)) == columns(BENCHMARKS[name])


def test_a_place_that_cannot_be_written_is_one_line_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShadowtuneError, match=r"cannot write results to .*--out") as refused:
        ResultFiles(tmp_path / "file", TRAIN)
    assert "\n" not in str(refused.value)
