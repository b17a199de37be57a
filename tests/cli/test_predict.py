import io
import json

import pytest

from shadowtune.cli import predict
from shadowtune.cli.main import main
from shadowtune.evaluation.prediction import Predictor
from tests.support.commands import ROWS, write_config, write_rows

UNLABELLED = [{"prompt": row["prompt"], "id": number} for number, row in enumerate(ROWS)]


@pytest.fixture
def requests(tmp_path):
    return str(write_rows(tmp_path / "requests.jsonl", UNLABELLED))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def generated(source, mode, tmp_path, prompts):
    command = ["generate", str(source), *prompts, "--mode", mode, "--max-new-tokens", "4"]
    assert main([*command, "--json", str(tmp_path / "g.json")]) == 0
    return [row["answer"].strip() for row in json.loads((tmp_path / "g.json").read_text())["rows"]]


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_rows_are_labelled_by_generated_answers(mode, shadow_run, requests, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["predict", str(shadow_run), requests, "--mode", mode, "--max-new-tokens", "4", "--quiet"]
    assert main([*command, "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    found = lines(out)
    assert [{key: row[key] for key in ("prompt", "id")} for row in found] == UNLABELLED
    assert [row["prediction"] for row in found] == generated(shadow_run, mode, tmp_path, [r["prompt"] for r in ROWS])
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["rows"] == len(ROWS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
    assert "8 rows, predicted by" in capsys.readouterr().err


def test_an_interrupted_file_is_continued_to_the_same_result(shadow_run, requests, tmp_path, monkeypatch, capsys):
    command = ["predict", str(shadow_run), requests, "--max-new-tokens", "4", "--batch-size", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl")]) == 0
    monkeypatch.setattr(predict, "CHUNK", 3)
    original, calls = Predictor.predict, []

    def interrupted(self, rows, progress):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, rows, progress)

    monkeypatch.setattr(Predictor, "predict", interrupted)
    assert main([*command, "--out", str(tmp_path / "out.jsonl")]) == 130
    assert not (tmp_path / "out.jsonl").exists()
    (partial,) = tmp_path.glob(".out.jsonl.*.partial")
    with partial.open("a") as file:
        file.write('{"prompt": "cut sh')
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "continues after 3 rows" in capsys.readouterr().err
    assert calls == [3, 3, 3, 2]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob(".out.jsonl.*"))


def test_texts_come_from_standard_input(shadow_run, monkeypatch, tmp_path, capsys):
    expected = generated(shadow_run, "attached", tmp_path, ["say one", "say ten"])
    capsys.readouterr()
    for options, texts in (([], ["say one"]), (["-"], ["say one"]), (["--lines"], ["say one", "say ten"])):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n" * (options == ["--lines"])))
        assert main(["predict", str(shadow_run), *options, "--max-new-tokens", "4"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert found == [{"text": t, "prediction": e} for t, e in zip(texts, expected, strict=False)]


ASKED = [{"role": "user", "content": "say one"}]
FORMATS = {
    "messages.jsonl": [{"messages": ASKED}, {"messages": [*ASKED, {"role": "assistant", "content": "known"}]}],
    "prompt.jsonl": [{"prompt": ASKED}, {"prompt": "say one", "completion": "known"}],
    "sharegpt.jsonl": [{"conversations": [{"from": "human", "value": "say one"}]}],
    "alpaca.jsonl": [{"instruction": "say one"}, {"instruction": "say one", "input": "", "output": "known"}],
    "text.jsonl": [{"text": "say one", "label": 7}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_any_format_are_answered_after_their_question(name, shadow_run, tmp_path):
    out = tmp_path / "out.jsonl"
    file = write_rows(tmp_path / name, FORMATS[name])
    assert main(["predict", str(shadow_run), str(file), "--out", str(out), "--max-new-tokens", "4", "--quiet"]) == 0
    expected = generated(shadow_run, "attached", tmp_path, ["say one"])[0]
    assert lines(out) == [{**row, "prediction": expected} for row in FORMATS[name]]


def test_tables_are_labelled_by_the_column_that_is_named(shadow_run, tmp_path):
    (tmp_path / "t.csv").write_text("id,question\n1,say one\n2,say ten\n")
    out = tmp_path / "out.jsonl"
    command = ["predict", str(shadow_run), str(tmp_path / "t.csv"), "--column", "question", "--max-new-tokens", "4"]
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    answers = generated(shadow_run, "attached", tmp_path, ["say one", "say ten"])
    assert [(row["id"], row["prediction"]) for row in lines(out)] == [("1", answers[0]), ("2", answers[1])]


def test_columns_and_class_names_of_training_hold_for_unlabelled_tables(base, tmp_path):
    (tmp_path / "t.csv").write_text("ticket,team\none two,sales\nred sea,support\nsun,sales\nice,support\n")
    (tmp_path / "new.csv").write_text("ticket\none\nred\n")
    command = ["train", "--model", str(base), "--data", str(tmp_path / "t.csv"), "--output", str(tmp_path / "run")]
    columns = ["data.columns.text=ticket", "data.columns.label=team", "task=classification", "data.validation="]
    assert main([*command, *columns, "shadow.rank=4", "max_steps=1", "--quiet"]) == 0
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--out", str(out), "--quiet"]) == 0
    assert [row["ticket"] for row in lines(out)] == ["one", "red"]
    assert {row["prediction"] for row in lines(out)} <= {"sales", "support"}


def test_instructions_are_asked_as_in_training(shadow_run, tmp_path):
    rows = [{"instruction": "say", "input": "one"}, {"instruction": "say one", "input": None}]
    out, file = tmp_path / "out.jsonl", str(write_rows(tmp_path / "rows.jsonl", rows))
    assert main(["predict", str(shadow_run), file, "--out", str(out), "--max-new-tokens", "4", "--quiet"]) == 0
    expected = generated(shadow_run, "attached", tmp_path, ["say\n\none", "say one"])
    assert [row["prediction"] for row in lines(out)] == expected


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    rows = [{"text": text, "label": len(text) % 3} for text in ("a", "at", "the", "day", "sunday", "on")]
    config = write_config(path / "c.yaml", base, write_rows(path / "rows.jsonl", rows), path / "run")
    assert main(["train", str(config), "task=classification", "--quiet"]) == 0
    assert main(["detach", str(path / "run"), "--out", str(path / "small")]) == 0
    return path


def test_a_classifier_labels_rows_as_it_is_evaluated(classifier, tmp_path, capsys):
    data = str(classifier / "rows.jsonl")
    answers = tmp_path / "answers.jsonl"
    command = ["evaluate", str(classifier / "run"), "--data", data, "--quiet", "--predictions", str(answers)]
    assert main(command) == 0
    for mode in ("attached", "detached"):
        out = tmp_path / f"{mode}.jsonl"
        options = ["--mode", mode, "--as", "class", "--batch-size", "2", "--quiet"]
        assert main(["predict", str(classifier / "run"), data, "--out", str(out), *options]) == 0
        assert [str(row["class"]) for row in lines(out)] == [row[mode] for row in lines(answers)]
        assert all(1 / 3 <= row["class_probability"] <= 1 for row in lines(out))
    out = tmp_path / "small.jsonl"
    capsys.readouterr()
    assert main(["predict", str(classifier / "small"), data, "--out", str(out), "--as", "class", "--quiet"]) == 0
    assert [row["class"] for row in lines(out)] == [row["class"] for row in lines(tmp_path / "detached.jsonl")]
    assert "6 rows, predicted by" in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_names_of_classes_and_kinds_of_labels_come_from_the_config(problem, classifier, tmp_path):
    from shadowtune.cli.source import open_source

    opened = open_source(str(classifier / "small"))
    opened.model.config.id2label = {0: "red", 1: "green", 2: "LABEL_2"}
    opened.model.config.problem_type = problem
    made = Predictor(opened, opened.model).predict([{"text": "the"}, {"text": "at"}])
    logits = opened.model.requires_grad_(False)(
        **opened.tokenizer("the", return_tensors="pt", return_token_type_ids=False)
    ).logits[0]
    names = ["red", "green", 2]
    if problem == "regression":
        assert made[0].value == pytest.approx(float(logits[0]), rel=1e-4)
    elif problem == "multi_label_classification":
        assert made[0].value == [names[i] for i in range(3) if logits[i] > 0]
    else:
        assert made[0].value == names[int(logits.argmax())]
        assert made[0].probability == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"question": "a"}], [], "line 1: no format fits the columns 'question'; name the prompt's with --column"),
        ([{"prompt": " "}], [], "line 1: the prompt is empty"),
        ([{"prompt": "a"}, {"prompt": None}], [], "line 2: prompt must be text"),
        ([{"prompt": "a"}, {"prompt": "say one " * 40}], [], "line 2: prompt ("),
        ([{"prompt": "a", "prediction": 1}], [], "has a column 'prediction' already; name another one with --as"),
        ([{"prompt": "a"}], ["--column", "promt"], "no field 'promt'"),
        ([{"prompt": "a"}], ["--lines"], "--lines reads standard input"),
        ([{"prompt": "a"}], ["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        ([{"prompt": "a"}], ["--mode", "base", "--out", "DIR"], "exists already"),
        ([{"prompt": "a"}], ["--out", "DIR/no/file"], "is not a directory"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(rows, options, said, shadow_run, tmp_path, capsys):
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    words = [word.replace("DIR", str(tmp_path)) for word in options]
    words += [] if "--out" in words else ["--out", str(tmp_path / "out.jsonl")]
    words = words if "--max-new-tokens" in words else [*words, "--max-new-tokens", "4"]
    assert main(["predict", str(shadow_run), file, "--quiet", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()
