import json
from dataclasses import asdict

import pytest

from shadowtune.errors import DataError
from shadowtune.serving.edge.confidence import Signals
from shadowtune.serving.simulation.records import AnswerFile, RecordedAnswer

ORIGIN = {"model": "runs/a", "rows": "abc"}
FIRST = RecordedAnswer("set_timer", 1.0, 0.5, 0.25, 12, 3, [4, 5, 2], Signals(0.9, 0.8, 0.7, 0.6, 3))
SECOND = RecordedAnswer("ünlike", 0.0, 0.75, 0.5, 9, 1, [])


def test_answers_written_are_those_read_again(tmp_path):
    recording = AnswerFile(tmp_path / "edge.jsonl", ORIGIN)
    recording.add(FIRST)
    recording.add(SECOND)
    assert AnswerFile(tmp_path / "edge.jsonl", ORIGIN).answers == [FIRST, SECOND] == recording.answers


def test_a_file_of_version_0_1_is_read(tmp_path):
    file = tmp_path / "edge.jsonl"
    file.write_text(
        '{"schema": 1, "model": "runs/a", "rows": "abc"}\n'
        '{"text": "set_timer", "score": 1.0, "seconds": 0.5, "first_seconds": 0.25, "prompt_tokens": 12, '
        '"completion_tokens": 3, "tokens": [4, 5, 2], "signals": {"logprob": 0.9, "margin": 0.8, "entropy": 0.7, '
        '"first": 0.6, "length": 3}}\n'
    )
    assert AnswerFile(file, ORIGIN).answers == [FIRST]


def test_an_interrupted_recording_is_gone_on_with(tmp_path):
    file = tmp_path / "edge.jsonl"
    recording = AnswerFile(file, ORIGIN)
    recording.add(FIRST)
    recording.add(SECOND)
    file.write_bytes(file.read_bytes()[:-9])
    again = AnswerFile(file, ORIGIN)
    assert again.answers == [FIRST]
    again.add(SECOND)
    assert AnswerFile(file, ORIGIN).answers == [FIRST, SECOND]


@pytest.mark.parametrize(("name", "value"), [("model", "runs/b"), ("rows", "abd")])
def test_answers_of_another_origin_are_refused_by_name(tmp_path, name, value):
    AnswerFile(tmp_path / "edge.jsonl", ORIGIN)
    with pytest.raises(DataError, match=f"recorded with another {name}; delete it"):
        AnswerFile(tmp_path / "edge.jsonl", {**ORIGIN, name: value})


@pytest.mark.parametrize("line", ["{", "[]", '{"text": 1}', json.dumps({**asdict(FIRST), "mood": "good"})])
def test_a_damaged_line_is_named_in_one_line(tmp_path, line):
    file = tmp_path / "edge.jsonl"
    AnswerFile(file, ORIGIN).add(FIRST)
    with file.open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(DataError, match=r"edge\.jsonl, line 3") as raised:
        AnswerFile(file, ORIGIN)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    file = tmp_path / "edge.jsonl"
    file.write_text("hello\n")
    with pytest.raises(DataError, match="damaged"):
        AnswerFile(file, ORIGIN)
    assert file.read_text() == "hello\n"
