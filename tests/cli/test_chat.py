import builtins
import io
import json

import pytest

from shadowtune.cli import chat
from shadowtune.cli.main import main
from tests.support.chats import chat_tokenizer, learned_run

ANSWERS = {"hi": "hello", "one": "red", "more": "sun"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned conversations of two turns by heart."""
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"messages": first},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "red"}]},
        {"messages": [*first, {"role": "user", "content": "one"}, {"role": "assistant", "content": "sun"}]},
    ]
    return str(learned_run(tmp_path_factory.mktemp("chat"), rows, chat_tokenizer(), 120))


def talk(run, monkeypatch, capsys, *lines, options=(), code=0):
    """Pipe lines into a conversation; return the answers and the notes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", run, "--max-new-tokens", "6", *options]) == code
    shown = capsys.readouterr()
    return shown.out.splitlines(), notes_of(shown.err)


def notes_of(text):
    """The lines on standard error without transformers' progress bar."""
    return [line for line in text.splitlines() if line and "Loading weights" not in line]


def test_earlier_turns_are_part_of_the_conversation(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "r.json"
    answers, notes = talk(run, monkeypatch, capsys, "hi", "one", "/reset", "one", options=("--json", str(file)))
    assert answers == ["hello", "sun", "red"]
    assert notes == ["the conversation begins anew"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["answer"] for row in rows] == answers and {row["mode"] for row in rows} == {"attached"}


def test_the_mode_changes_within_a_conversation(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "r.json"
    lines = ("hi", "/mode detached", "hi", "/mode", "/mode base", "/mode attached", "/exit", "hi")
    answers, notes = talk(run, monkeypatch, capsys, *lines, options=("--json", str(file)))
    assert len(answers) == 2
    assert [row["mode"] for row in json.loads(file.read_text())["rows"]] == ["attached", "detached"]
    assert [note.split(";")[0] for note in notes] == [
        f"answers {m}" for m in ("detached", "detached", "base", "attached")
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [("/mode alone", "has no mode 'alone'; it has attached, detached, base"), ("/rest", "there is no /rest")],
)
def test_a_wrong_command_ends_a_pipe_and_not_a_terminal(run, line, said, monkeypatch, capsys):
    _, notes = talk(run, monkeypatch, capsys, line, code=2)
    assert said in notes[-1]
    answers, notes = at_terminal(run, monkeypatch, capsys, line, "/help", "hi")
    assert answers == ["hello"] and said in notes[1] and "/reset" in notes[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def at_terminal(run, monkeypatch, capsys, *inputs):
    """Type lines, or raise exceptions in their place; Ctrl-D comes last."""
    typed = iter([*inputs, EOFError()])

    def read(prompt):
        given = next(typed)
        if isinstance(given, BaseException):
            raise given
        return given

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(builtins, "input", read)
    capsys.readouterr()
    assert main(["chat", run, "--max-new-tokens", "6"]) == 0
    shown = capsys.readouterr()
    return [line for line in shown.out.splitlines() if line], notes_of(shown.err)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(run, monkeypatch, capsys):
    pieces = []

    def write(text):
        pieces.append(text)
        print(text, end="")
        if len(pieces) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_text", write)
    answers, _ = at_terminal(run, monkeypatch, capsys, "hi", KeyboardInterrupt(), "", "/reset", "one")
    assert answers[0].endswith(" ...") and "hello".startswith(answers[0].removesuffix(" ..."))
    assert answers[1:] == ["red"]


@pytest.fixture
def session(run):
    from shadowtune.cli.source import open_source
    from shadowtune.evaluation.generation import GenerationOptions

    return chat.ChatSession(open_source(run), "attached", GenerationOptions(6), {})


def test_a_system_message_begins_anew(run, session, monkeypatch, capsys):
    with session:
        session.answer("hi", lambda text: None)
        assert [turn["content"] for turn in session.turns] == ["hi", "hello"]
        session.set_system("be brief")
        assert session.turns == [] and session.system == [{"role": "system", "content": "be brief"}]
        session.answer("hi", lambda text: None)
        session.set_system("")
        assert session.system == []
    answers, notes = talk(run, monkeypatch, capsys, "/system", "hi", options=("--system", "x"))
    assert answers == ["hello"] and notes == ["the conversation begins anew, without a system message"]


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(run, session, monkeypatch, capsys):
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    session.turns = [{"role": "user", "content": "old"}, turn[1], *turn * 8]
    with session:
        assert session.answer("one", lambda text: None) is not None
    assert 0 < len(session.turns) < 18 and session.turns[:2] == turn
    assert "its oldest turns are left out: " in capsys.readouterr().err
    _, notes = talk(run, monkeypatch, capsys, "one " * 200, code=2)
    assert "the message has" in notes[-1]


def test_a_model_of_single_requests_says_so(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "hi", "completion": "hello"}, {"prompt": "one", "completion": "red"}]
    single = str(learned_run(tmp_path, rows, chat_tokenizer(), 80, template="Say {prompt}:", chat_template=False))
    answers, notes = at_terminal(single, monkeypatch, capsys, "hi", "one", "/system x")
    assert answers == ["hello", "red"]
    assert "does not read earlier messages" in notes[1] and "reads no system message" in notes[2]


def test_a_message_may_begin_with_a_slash(run, monkeypatch, capsys, tmp_path):
    talk(run, monkeypatch, capsys, "//mode", options=("--json", str(tmp_path / "r.json")))
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["prompt"] == "/mode"
