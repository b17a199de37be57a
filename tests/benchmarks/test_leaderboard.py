import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import leaderboard
from benchmarks.leaderboard import Entry, Score, append, measure, read, table
from shadowtune.config.settings import from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, DataError
from tests.support.commands import save_base
from tests.support.tasks import write_task_data

ROOT = Path(__file__).parents[2]
SETTINGS = {"data": {"task": "clinc150", "limit": 8}, "method": "lora", "max_steps": 2}


def entry(name="lora", accuracy=0.8, detached=None, seconds=100.0, **changes):
    detached = None if detached is None else Score(detached, detached, detached)
    settings = {
        "config": SETTINGS, "test_digest": "aa", "load": 0.0, "provenance": {"commit": "c"}, "previous": "", **changes
    }  # fmt: skip
    return Entry(name, seconds, Score(accuracy, accuracy, accuracy), detached, **settings)


def test_rows_are_added_at_the_end_and_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read(file) == []
    for name in ("lora", "a", "b"):
        append(file, entry(name))
    assert [each.name for each in read(file)] == ["lora", "a", "b"]
    assert len({each.previous for each in read(file)}) == 3


@pytest.mark.parametrize("change", ["remove", "edit", "swap"])
def test_a_row_that_was_changed_or_removed_is_found(tmp_path, change):
    file = tmp_path / "rows.jsonl"
    for name in ("lora", "a", "b"):
        append(file, entry(name))
    lines = file.read_text().splitlines()
    if change == "remove":
        del lines[1]
    elif change == "edit":
        lines[0] = lines[0].replace('"seconds": 100.0', '"seconds": 10.0')
    else:
        lines = [lines[1], lines[0], lines[2]]
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match="rows only grow"):
        read(file)
    with pytest.raises(DataError, match="rows only grow"):
        append(file, entry("c"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (lambda: entry("lora"), "there is a row lora already"),
        (lambda: entry("x", test_digest="bb"), "x answered other rows than lora"),
    ],
)
def test_a_row_that_does_not_belong_is_refused_and_the_file_stays(tmp_path, row, said):
    file = tmp_path / "rows.jsonl"
    append(file, entry("lora"))
    before = file.read_bytes()
    with pytest.raises(DataError, match=said):
        append(file, row())
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"accuracy": 1.5},
        {"config": {**SETTINGS, "model": "other"}},
        {"config": {**SETTINGS, "data": {"task": "sst5"}}},
        {"config": {**SETTINGS, "epocs": 1}},
        {"name": " "},
        {"protocol": 2},
    ],
)
def test_what_is_no_row_cannot_be_made(changes):
    with pytest.raises(ConfigError):
        entry(**changes)


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    append(file, entry())
    file.write_text(file.read_text() + '{"name": "x"}\n')
    with pytest.raises(DataError, match=r"line 2: no row of the leaderboard: missing key seconds"):
        read(file)


def test_seconds_count_in_the_modes_that_reach_the_target():
    rows = [
        entry("lora", 0.8, seconds=100.0),
        entry("slow", 0.9, 0.77, seconds=150.0),
        entry("fast", 0.76, 0.7, seconds=40.0),
        entry("short", 0.75, seconds=10.0),
    ]
    found = {row["name"]: (row["attached_seconds"], row["detached_seconds"]) for row in table(rows)}
    assert found == {"lora": (100.0, None), "slow": (150.0, 150.0), "fast": (40.0, None), "short": (None, None)}
    assert [row["name"] for row in table(rows)] == ["fast", "lora", "slow", "short"]


@pytest.fixture
def small_protocol(tmp_path, monkeypatch):
    """The protocol on a tiny base and eight rows; no thread is lost to other tests."""
    save_base(tmp_path / "base")
    write_task_data(tmp_path / "data", "clinc150")
    monkeypatch.setattr(leaderboard, "BASE", str(tmp_path / "base"))
    monkeypatch.setattr(leaderboard, "TEST_ROWS", 8)
    monkeypatch.setattr(leaderboard, "THREADS", 1)
    data = {"task": "clinc150", "directory": str(tmp_path / "data"), "limit": 8}
    settings = {"model": str(tmp_path / "base"), "data": data, "max_steps": 2, "batch_size": 4}
    return {**settings, "output": str(tmp_path / "run")}


def test_the_protocol_trains_answers_in_each_mode_and_keeps_the_settings(tmp_path, small_protocol):
    config = from_mapping(TrainConfig, {**small_protocol, "shadow": {"rank": 4}}, "")
    found = measure("mine", config)
    assert found.seconds > 0
    assert found.detached is not None
    assert found.config["shadow"] == {"rank": 4}
    assert found.config["data"] == {"task": "clinc150", "limit": 8}
    assert found.provenance["versions"]["torch"]
    append(tmp_path / "rows.jsonl", found)
    assert read(tmp_path / "rows.jsonl") == [found]


def test_other_data_or_another_base_is_refused_before_training(tmp_path, small_protocol):
    with pytest.raises(ConfigError, match=r"model must be .*base, got 'other'"):
        measure("mine", from_mapping(TrainConfig, {**small_protocol, "model": "other"}, ""))
    assert not (tmp_path / "run").exists()


def test_fewer_test_rows_than_the_protocol_s_are_refused(small_protocol, monkeypatch):
    monkeypatch.setattr(leaderboard, "TEST_ROWS", 500)
    with pytest.raises(DataError, match="12 test rows, fewer than the 500 of the protocol"):
        measure("mine", from_mapping(TrainConfig, {**small_protocol, "method": "lora"}, ""))


def test_the_committed_rows_are_sound_and_their_configs_follow_the_protocol():
    entries = read(ROOT / "benchmarks" / "leaderboard.jsonl")
    assert not entries or entries[0].config["method"] == "lora"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "src" / "shadowtune" / "configs" / "leaderboard").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_entries_follow_the_protocol_and_name_their_command(path):
    from shadowtune.config.loading import load_config

    leaderboard.check_protocol(load_config(TrainConfig, path, []))
    assert f"benchmarks/leaderboard.py add configs/leaderboard/{path.name}" in path.read_text().splitlines()[1]


def test_the_script_shows_the_rows_and_says_what_is_wrong_in_a_line(tmp_path, capsys):
    script = leaderboard
    file = tmp_path / "rows.jsonl"
    assert script.main(["--file", str(file)]) == 0
    assert "has no rows" in capsys.readouterr().out
    append(file, entry("lora"))
    append(file, entry("mine", 0.9, seconds=40.0))
    assert script.main(["--file", str(file)]) == 0
    assert "mine" in capsys.readouterr().out
    settings = tmp_path / "x.yaml"
    settings.write_text(json.dumps({"model": "other", "data": {"task": "sst5"}}))
    assert script.main(["--file", str(file), "add", str(settings), "new"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "leaderboard: error: model must be smollm2-135m, got 'other'; data.task must be clinc150, got 'sst5'"
    assert script.main(["--file", str(file), "add", str(settings), "mine"]) == 2
    assert "there is a row mine already" in capsys.readouterr().err
    assert dataclasses.asdict(read(file)[0])["name"] == "lora"
