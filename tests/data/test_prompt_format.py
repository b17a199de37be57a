import pytest

from shadowtune.data.encoding import prompt_ids
from shadowtune.data.prompt_format import FILE, PromptFormat
from shadowtune.errors import DataError
from tests.support.tokenizers import tiny_tokenizer

TOKENIZER, BARE = tiny_tokenizer(), tiny_tokenizer(chat_template=None)
REQUEST = PromptFormat("Request: {text}\nIntent:", chat_template=False)


def user(text):
    return {"role": "user", "content": text}


def decoded(ids, tokenizer=TOKENIZER):
    return tokenizer.decode(ids)


def test_words_go_where_the_template_had_a_field():
    assert REQUEST.fill("wake me") == "Request: wake me\nIntent:"
    assert PromptFormat().fill("wake {me}") == "wake {me}"


def test_a_template_of_several_fields_cannot_be_filled_with_words_alone():
    with pytest.raises(DataError, match="the fields context, question"):
        PromptFormat("{context} {question}").fill("words")


def test_one_message_becomes_the_prompt_of_training():
    assert REQUEST.encode([user("wake me")], TOKENIZER) == prompt_ids(
        "Request: wake me\nIntent:", TOKENIZER, chat_template=False
    )
    chat = PromptFormat("Request: {text}")
    assert chat.encode([user("wake me")], TOKENIZER) == prompt_ids("Request: wake me", TOKENIZER)


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ([{"role": "system", "content": "be short"}, user("two")], "a system message"),
        ([user("one"), {"role": "assistant", "content": "x"}, user("two")], "earlier turns"),
        ([user("one"), user("two")], "earlier turns"),
        ([{"role": "system", "content": "two"}], "its role"),
    ],
)
def test_without_a_chat_template_what_the_model_cannot_read_is_refused(messages, lost):
    for form, tokenizer in ((REQUEST, TOKENIZER), (PromptFormat("Q {text}"), BARE)):
        with pytest.raises(DataError, match=f"of which {lost} would be lost") as caught:
            form.encode(messages, tokenizer)
        assert "\n" not in str(caught.value)


def test_with_a_chat_template_all_messages_are_read_and_the_last_is_filled_in():
    messages = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    expected = TOKENIZER.apply_chat_template(
        [*messages[:2], user("Q three")], tokenize=False, add_generation_prompt=True
    )
    assert decoded(PromptFormat("Q {text}").encode(messages, TOKENIZER)) == expected


def test_a_lone_message_of_another_role_keeps_its_role():
    message = {"role": "system", "content": "one"}
    assert "system" in decoded(PromptFormat().encode([message], TOKENIZER))


@pytest.mark.parametrize("content", [None, "", "  ", [{"type": "text", "text": "a"}]])
def test_a_message_without_text_is_refused(content):
    with pytest.raises(DataError, match="no text"):
        PromptFormat().encode([user(content)], TOKENIZER)


def test_no_messages_are_refused():
    with pytest.raises(DataError, match="no messages"):
        PromptFormat().encode([], TOKENIZER)


def test_what_is_saved_is_loaded(tmp_path):
    REQUEST.save(tmp_path)
    assert PromptFormat.load(tmp_path) == REQUEST


def test_a_directory_without_the_file_has_the_chat_template_alone(tmp_path):
    assert PromptFormat.load(tmp_path) == PromptFormat(None, True)


@pytest.mark.parametrize("text", ["", "[]", '{"template": 3}', '{"tempate": "a"}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=FILE) as caught:
        PromptFormat.load(tmp_path)
    assert "\n" not in str(caught.value)
