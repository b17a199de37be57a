import json

import pytest

from shadowtune.cli.main import main
from tests.support.commands import write_config


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,id\nsay one,one,1\n" + "say two," + "two " * 100 + ",2\n")
    return path


COLUMNS = ("data.columns.prompt=question", "data.columns.completion=answer")


def test_examples_are_shown_token_by_token_with_the_learned_ones_marked(base, table, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["data", str(table), *COLUMNS, "--model", str(base), "--json", str(out), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"{table}: read as prompt and completion: 2 examples"
    assert "no setting reads id" in shown
    assert "[[o·n·e·<|im_end|>]]" in shown
    document = json.loads(out.read_text())
    assert document["counts"]["examples"] == 2
    assert document["counts"]["unread"] == ["id"]
    (row,) = document["rows"]
    learned = [token for token, target in zip(row["tokens"], row["learned"], strict=True) if target]
    assert (row["row"], learned) == (2, ["o", "n", "e", "<|im_end|>"])


def test_the_middle_of_a_long_example_is_left_out(base, table, capsys):
    assert main(["data", str(table), *COLUMNS, "--model", str(base)]) == 0
    shown = capsys.readouterr().out
    assert " tokens ...\n" in shown
    assert shown.count("[[") == shown.count("]]")


def test_learned_tokens_are_green_in_a_terminal_and_marked_with_no_color(base, table, capsys, monkeypatch):
    arguments = ["data", str(table), *COLUMNS, "--model", str(base), "--rows", "1"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "\x1b[1;32mo" in shown
    assert "[[" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(arguments) == 0
    assert "[[o" in capsys.readouterr().out


def test_classes_and_the_settings_of_a_run_are_shown(base, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nsay one,billing\nsay two,other\n")
    assert main(["data", str(path), "task=classification", "--model", str(base)]) == 0
    shown = capsys.readouterr().out
    assert "2 classes (billing, other)" in shown
    assert "label: billing" in shown
    config = write_config(tmp_path / "c.yaml", base, path, tmp_path / "run")
    assert main(["data", str(config)]) == 0
    assert "text and label (learned as answers)" in capsys.readouterr().out


def test_a_run_directory_shows_what_it_was_trained_on(shadow_run, data, capsys):
    assert main(["data", str(shadow_run), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{data}: read as prompt and completion: 8 examples")
    assert "[[o·n·e·<|im_end|>]]" in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "holds no rows"),
        ("two.csv", b"question,answer\na,b\n", "data.columns.prompt=question data.columns.completion=answer"),
        (
            "mixed.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"frage": "a", "wort": "b"}\n',
            "line 2: no format fits",
        ),
        ("unlabelled.csv", b"text,label\na,x\nb,\n", "line 3: the label (label) is missing"),
        ("latin.csv", b"text\ncaf\xe9\n", "line 2: not UTF-8 text at byte 8"),
        ("wide.csv", b",".join(b"c%d" % number for number in range(1_000_000)), "1,000,000 columns"),
        ("huge.csv", b"text\n" + b"x" * 300_000 + b"\n", "line 2"),
        ("nan.jsonl", b'{"prompt": "a", "completion": NaN}\n', "line 1: completion must be text, got nan"),
        ("rows.xlsx", b"PK", "save the sheet as CSV"),
        ("directory", None, "has no split 'train'; it has none; a directory holds a file for each split"),
    ],
)
def test_bad_files_are_one_line_with_file_row_and_a_hint(base, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["data", str(path), "--model", str(base)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("shadowtune: error: ")
    assert name in line
    assert message in line
    assert len(line) < 700
