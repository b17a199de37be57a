import pytest

from shadowtune.cli.labelled import data_of_format, read_labelled
from shadowtune.config.data import DataConfig
from shadowtune.data.dataset import Dataset
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from tests.support.commands import write_rows
from tests.support.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def read(tmp_path, rows, limit=None, **settings):
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    return read_labelled(Dataset.open(DataConfig(train="other", **settings)), TOKENIZER, file, "test", limit)


def test_a_user_sends_the_words_and_the_model_reads_the_prompt_of_training(tmp_path):
    row = {"prompt": "wake me", "completion": "alarm"}
    labelled = read(tmp_path, [row], template="Do: {prompt}\nNow:", chat_template=False)
    asked = labelled.requests[0]
    assert asked.messages == ({"role": "user", "content": "wake me"},)
    assert asked.text == "Do: wake me\nNow:"
    assert asked.prompt == TOKENIZER("Do: wake me\nNow:")["input_ids"]
    assert asked.references == ["alarm"]
    assert (labelled.score(0, " Alarm\n"), labelled.score(0, "alarms")) == (1, 0)


def test_what_the_prompt_format_makes_of_the_words_is_what_is_asked(tmp_path):
    row = {"prompt": "wake me", "completion": "alarm"}
    for form in (PromptFormat("Do: {prompt}", False), PromptFormat("Do: {prompt}"), PromptFormat()):
        file = str(write_rows(tmp_path / "rows.jsonl", [row]))
        asked = read_labelled(data_of_format(form, file), TOKENIZER, file, "test", None).requests[0]
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
