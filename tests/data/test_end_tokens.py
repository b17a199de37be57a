import pytest
from transformers import GenerationConfig

from shadowtune.data.encoding import encode_prompts, encode_rows
from shadowtune.data.examples import FieldNames
from shadowtune.data.generation import end_tokens, ends_to_record, record_ends
from tests.support.bases import tiny_base
from tests.support.chats import CHATML_STOP, GPT_OSS, QWEN3, R1, STOP, WRAPPING, chat_tokenizer

ROWS = [{"prompt": "hi", "completion": "yo"}, {"prompt": "the sea", "completion": "wet"}]


def report_of(rows, tokenizer, **settings):
    return encode_rows(rows, tokenizer, FieldNames(), 200, **settings)[1]


@pytest.mark.parametrize(
    ("template", "wanted", "end"),
    [
        (CHATML_STOP, True, STOP),
        (QWEN3, True, "<|im_end|>"),
        (GPT_OSS, True, "<|return|>"),
        (WRAPPING, True, "<|im_end|>"),
        (R1, False, "<|im_end|>"),
        (None, True, "<|im_end|>"),
    ],
    ids=["own_end", "qwen3", "gpt_oss", "none", "unused", "no_template"],
)
def test_the_token_that_ends_answers_is_read_off_the_encoded_rows(template, wanted, end):
    tokenizer = chat_tokenizer(template)
    rows, report = encode_rows(ROWS, tokenizer, FieldNames(), 200, chat_template=wanted)
    assert [tokenizer.convert_ids_to_tokens(row["input_ids"][-1]) for row in rows] == [end, end]
    assert report.ends == (tokenizer.convert_tokens_to_ids(end),)


def test_plain_texts_end_in_the_tokenizers_end_unless_theirs_was_cut_off():
    tokenizer = chat_tokenizer(CHATML_STOP)
    texts = [{"text": "the sea is wet"}] * 2 + ROWS
    assert report_of(texts[:2], tokenizer).ends == (2,)
    assert report_of(texts[:2], tokenizer, overlong="truncate").ends == (2,)
    assert encode_rows(texts[:2], tokenizer, FieldNames(), 4)[1].ends == ()
    assert set(report_of(texts, tokenizer).ends) == {2, tokenizer.convert_tokens_to_ids(STOP)}


QUOTING = (
    "{% for message in messages %}{{ message.role + ' \"' | replace('\"', '-') + message.content + '-' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.mark.parametrize("template", [WRAPPING, QUOTING], ids=["bare", "wrapped"])
@pytest.mark.parametrize("answer", ["a", "s", "an", "assistant", "yes yes", "-", "a-", ""])
def test_every_answer_gets_an_end_whatever_it_begins_or_ends_with(template, answer):
    tokenizer = chat_tokenizer(template)
    (row,), report = encode_rows([{"prompt": "hi", "completion": answer}], tokenizer, FieldNames(), 200)
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    assert report.ends == (tokenizer.eos_token_id,)


def test_what_was_taught_comes_first_and_the_others_stay():
    tokenizer = chat_tokenizer(CHATML_STOP)
    config = GenerationConfig(eos_token_id=[0, 4])
    assert ends_to_record([82], set(), config, tokenizer) == (82, 0, 2, 4)
    assert ends_to_record([82, 4], set(), config, tokenizer) == (82, 4, 0, 2)
    assert ends_to_record([82], {4, 9}, config, tokenizer) == (82, 0, 2), "answers hold it before their end"
    assert ends_to_record([], set(), None, tokenizer) == (2,)


def test_a_model_that_was_trained_stops_where_that_is_recorded_and_others_at_the_tokenizers_end():
    model, tokenizer = tiny_base(), chat_tokenizer()
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, tokenizer) == [2, 7]
    assert end_tokens(model, tokenizer, (82, 0)) == [82, 0, 7]


def test_ends_are_recorded_as_one_token_or_a_list():
    model = tiny_base()
    for ends, expected in (((), 2), ((5,), 5), ((5, 0), [5, 0])):
        record_ends(model, ends)
        assert model.generation_config.eos_token_id == expected


def test_prompts_of_generation_are_unchanged_by_the_ends():
    tokenizer = chat_tokenizer(CHATML_STOP)
    rows, _ = encode_rows(ROWS, tokenizer, FieldNames(), 200)
    prompts = encode_prompts(ROWS, tokenizer, FieldNames(), 200)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row["input_ids"][: len(prompt.input_ids)] == prompt.input_ids
