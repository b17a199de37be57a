import io
import json

import pytest

from shadowtune.cli.main import main
from tests.support.chats import chat_tokenizer, learned_run


def test_answers_are_printed_and_measured(shadow_run, tmp_path, capsys):
    command = ["generate", str(shadow_run), "say one", "say ten", "--max-new-tokens", "5"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["prompt"] for row in rows] == ["say one", "say ten"]
    assert all(1 <= row["new_tokens"] <= 5 and row["tokens_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out == "".join(row["answer"] + "\n" for row in rows)


def test_prompts_come_from_standard_input(shadow_run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("say red"))
    command = ["generate", str(shadow_run), "--mode", "detached", "--max-new-tokens", "3"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (row["prompt"], row["mode"]) == ("say red", "detached")


@pytest.mark.parametrize(("options", "prompts"), [(["-"], ["say one\nsay ten"]), (["--lines"], ["say one", "say ten"])])
def test_standard_input_is_one_prompt_or_lines(options, prompts, shadow_run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("say one\nsay ten" + "\n\n" * ("--lines" in options)))
    command = ["generate", str(shadow_run), *options, "--max-new-tokens", "3"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    assert [row["prompt"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == prompts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lines", "hi"], "--lines reads prompts from standard input"),
        (["--lines"], "standard input has no lines"),
        (["-", "hi"], "- reads one prompt from standard input"),
    ],
)
def test_standard_input_and_prompts_do_not_mix(options, said, shadow_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", str(shadow_run), *options]) == 2
    assert said in capsys.readouterr().err


def test_sampling_repeats_with_its_seed(shadow_run, tmp_path):
    answers = []
    for seed in ("1", "1", "2"):
        command = ["generate", str(shadow_run), "say red", "--temperature", "1.5", "--seed", seed]
        assert main([*command, "--max-new-tokens", "12", "--json", str(tmp_path / "r.json")]) == 0
        answers.append(json.loads((tmp_path / "r.json").read_text())["rows"][0]["answer"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "the prompt is empty"),
        (["say one " * 40], "positions"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["hi", "--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_be_answered_is_one_line(arguments, said, shadow_run, capsys):
    assert main(["generate", str(shadow_run), *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_speculation_says_the_same_and_how_it_went(shadow_run, tmp_path, capsys):
    answers = {}
    for options in ([], ["--speculate"], ["--speculate", "3"], ["--speculate", "2", "--drafter", "combined"]):
        command = ["generate", str(shadow_run), "say one", "--max-new-tokens", "12", *options]
        assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
        (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
        answers[tuple(options)] = row["answer"]
        assert ("a pass" in capsys.readouterr().err) == (row["tokens_per_pass"] is not None) == bool(options)
    assert len(set(answers.values())) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--speculate", "many"], "--speculate takes a number of tokens or nothing, got 'many'"),
        (["--speculate", "200"], "length must be at least 1 and below 65, got 200"),
        (["--speculate", "--mode", "detached"], "--speculate is for --mode attached, got detached"),
    ],
)
def test_speculation_that_cannot_be_is_refused_in_a_line(shadow_run, options, said, capsys):
    assert main(["generate", str(shadow_run), "say one", *options]) == 2
    assert said in capsys.readouterr().err


def test_only_a_shadow_drafts(lora_run, capsys):
    assert main(["generate", str(lora_run), "say one", "--speculate"]) == 2
    assert "--speculate needs a shadow that generates" in capsys.readouterr().err


@pytest.fixture(scope="module")
def fields_run(tmp_path_factory):
    rows = [
        {"instruction": "say", "input": "one", "completion": "a"},
        {"instruction": "say", "completion": "b", "origin": "x"},
    ]
    settings = {"template": "{instruction}\n\n{input}", "optional_fields": ("input",), "chat_template": False}
    return learned_run(tmp_path_factory.mktemp("fields"), rows, chat_tokenizer(), 1, **settings)


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["say"], "say"),
        (["say", "--field", "input=two"], "say\n\ntwo"),
        (["--field", "instruction=do", "--field", "input=a=b"], "do\n\na=b"),
        (["--field", "instruction=do"], "do"),
        (["whole prompt", "--raw"], "whole prompt"),
    ],
)
def test_fields_of_a_template_are_given_by_name(fields_run, arguments, prompt, tmp_path):
    command = ["generate", str(fields_run), *arguments, "--max-new-tokens", "2", "--json", str(tmp_path / "r.json")]
    assert main(command) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--field", "input=two"], "instruction is not given"),
        (["say", "--field", "inptu=two"], "no field 'inptu' (did you mean input?)"),
        (["say", "--field", "input"], "--field takes NAME=VALUE, got 'input'"),
        (["say", "--field", "input=a", "--field", "input=b"], "--field input is given twice"),
        (["say", "--field", "input=a", "--raw"], "leave one of them out"),
        (["say", "--field", "instruction=a"], "are the same part of the prompt"),
    ],
)
def test_fields_that_do_not_fit_are_one_line(fields_run, arguments, said, capsys):
    assert main(["generate", str(fields_run), *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_field_of_the_rows_that_nothing_reads_is_named_once(tmp_path):
    lines = []
    rows = [{"prompt": "a", "completion": "b", "origin": "x", "id": 1}] * 3
    learned_run(tmp_path, rows, chat_tokenizer(), 1, report=lines.append)
    assert [line for line in lines if "warning" in line] == [
        "warning: no setting reads id, origin of the training rows"
    ]
