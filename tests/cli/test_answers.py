import os

import pytest

from shadowtune.cli.answers import (
    AnswerSource,
    edge_source,
    read_evaluation_set,
    record_answers,
    run_source,
)
from shadowtune.cli.main import main
from shadowtune.config.data import DataConfig
from shadowtune.data.dataset import Dataset
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.evaluation.trained_model import data_of_format
from shadowtune.serving.requests import OutputChunk, RequestError, RoutingDecision, Usage
from tests.support.commands import ROWS, write_rows
from tests.support.tokenizers import tiny_tokenizer


class Parrot:
    """Answers each request with its number, up to a number at which it fails."""

    def __init__(self, fails_at=99):
        self.asked, self.fails_at, self.closed = [], fails_at, False
        self.decision = RoutingDecision("cloud", "fake")

    async def generate(self, request):
        self.asked.append(request)
        if len(self.asked) == self.fails_at:
            raise RequestError("no more", 503)
        return self

    async def __aiter__(self):
        yield OutputChunk("ten", finish_reason="stop", usage=Usage(4, 2))

    async def aclose(self):
        self.closed = True


@pytest.fixture
def evaluation_set(tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", ROWS[:4]))
    return read_evaluation_set(data_of_format(PromptFormat(), file), tiny_tokenizer(), file, "test", None)


def remote(backend, words=True):
    return AnswerSource("cloud", "http://fake", lambda: backend, remote=words)


def test_answers_are_scored_kept_and_not_asked_for_again(evaluation_set, tmp_path):
    parrot = Parrot()
    answers = record_answers(remote(parrot), evaluation_set, tmp_path, quiet=True)
    assert [answered.score for answered in answers] == [0, 0, 1, 0]
    assert len(parrot.asked) == 5  # the first one twice, and the first of these forgotten
    assert parrot.closed
    assert record_answers(remote(None), evaluation_set, tmp_path, quiet=True) == answers


def test_what_an_interruption_left_is_gone_on_with(evaluation_set, tmp_path):
    failing, second = Parrot(fails_at=4), Parrot()
    with pytest.raises(RequestError, match="no more"):
        record_answers(remote(failing), evaluation_set, tmp_path, quiet=True)
    assert failing.closed
    assert len(record_answers(remote(second), evaluation_set, tmp_path, quiet=True)) == 4
    assert [request.messages[0]["content"] for request in second.asked] == [
        ROWS[place]["prompt"] for place in (2, 2, 3)
    ]


def test_a_remote_endpoint_reads_messages_and_a_model_of_ours_tokens(evaluation_set, tmp_path):
    servers = Parrot(), Parrot()
    for number, (parrot, words) in enumerate(zip(servers, (True, False), strict=True)):
        place = tmp_path / str(number)
        place.mkdir()
        record_answers(
            AnswerSource("edge", str(tmp_path), lambda parrot=parrot: parrot, words), evaluation_set, place, quiet=True
        )
    assert (servers[0].asked[1].prompt, servers[0].asked[1].messages) == (None, evaluation_set.requests[0].messages)
    assert (servers[1].asked[1].prompt, servers[1].asked[1].messages) == (evaluation_set.requests[0].prompt, None)
    assert servers[1].asked[1].sampling.temperature == 0
    assert servers[1].asked[1].max_tokens == evaluation_set.max_new_tokens


def test_a_model_that_was_written_anew_is_another(evaluation_set, tmp_path):
    model = tmp_path / "edge.gguf"
    model.write_text("old")
    side = AnswerSource("edge", str(model), Parrot)
    record_answers(side, evaluation_set, tmp_path, quiet=True)
    later = model.stat().st_mtime_ns + 10**9
    os.utime(model, ns=(later, later))
    with pytest.raises(DataError, match="recorded with another version of the model"):
        record_answers(side, evaluation_set, tmp_path, quiet=True)


def test_a_side_that_is_none_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        edge_source(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="not a run directory"):
        run_source("cloud", str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {train: x}\ntask: classification\n")
    with pytest.raises(ConfigError, match="classification run"):
        run_source("lora", str(tmp_path))


def test_a_cloud_that_is_not_there_is_one_line(shadow_run, data, tmp_path, capsys):
    command = ["simulate", str(data), "--edge", str(shadow_run), "--cloud", "http://127.0.0.1:9", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("shadowtune: error: cloud unreachable")


TOKENIZER = tiny_tokenizer()


def read(tmp_path, rows, limit=None, **settings):
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    return read_evaluation_set(Dataset.open(DataConfig(train="other", **settings)), TOKENIZER, file, "test", limit)


def test_a_user_sends_the_words_and_the_model_reads_the_prompt_of_training(tmp_path):
    row = {"prompt": "wake me", "completion": "alarm"}
    evaluation_set = read(tmp_path, [row], template="Do: {prompt}\nNow:", chat_template=False)
    asked = evaluation_set.requests[0]
    assert asked.messages == ({"role": "user", "content": "wake me"},)
    assert asked.text == "Do: wake me\nNow:"
    assert asked.prompt == TOKENIZER("Do: wake me\nNow:")["input_ids"]
    assert asked.references == ["alarm"]
    assert (evaluation_set.score(0, " Alarm\n"), evaluation_set.score(0, "alarms")) == (1, 0)


def test_what_the_prompt_format_makes_of_the_words_is_what_is_asked(tmp_path):
    row = {"prompt": "wake me", "completion": "alarm"}
    for form in (PromptFormat("Do: {prompt}", False), PromptFormat("Do: {prompt}"), PromptFormat()):
        file = str(write_rows(tmp_path / "rows.jsonl", [row]))
        asked = read_evaluation_set(data_of_format(form, file), TOKENIZER, file, "test", None).requests[0]
        assert form.encode(asked.messages, TOKENIZER) == asked.prompt


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"a": "one", "b": "two", "completion": "x"}, {"template": "{a} {b}"}),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}, {}),
    ],
)
def test_a_row_that_is_more_than_a_users_words_goes_as_tokens(tmp_path, row, settings):
    asked = read(tmp_path, [row], **settings).requests[0]
    assert asked.messages is None
    assert asked.prompt
    assert asked.references == ["x"]


def test_answers_have_room_for_the_longest_true_one(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "twelve bells"}]
    assert read(tmp_path, rows).max_new_tokens == len(TOKENIZER("twelve bells")["input_ids"]) + 2
    assert len(read(tmp_path, rows, limit=1).requests) == 1


def test_the_digest_tells_sets_apart(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    first = read(tmp_path, rows).digest
    assert read(tmp_path, rows).digest == first
    assert read(tmp_path, [{"prompt": "a", "completion": "c"}]).digest != first
    assert read(tmp_path, [{"prompt": "b", "completion": "b"}]).digest != first


def test_a_row_without_its_answer_is_named(tmp_path):
    with pytest.raises(DataError, match="line 1"):
        read(tmp_path, [{"prompt": "a"}])
