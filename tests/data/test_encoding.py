import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.encoding import (
    EncodedPrompt,
    EncodingReport,
    encode_classification,
    encode_prompts,
    encode_rows,
    prompt_ids,
)
from shadowtune.data.examples import FieldNames
from shadowtune.data.sources import Row, load_rows
from shadowtune.errors import DataError
from tests.support.properties import property_test
from tests.support.templates import UNCLOSED
from tests.support.tokenizers import tiny_tokenizer

CHATML = tiny_tokenizer()
BARE = tiny_tokenizer(chat_template=None)
TOKENIZERS = [CHATML, BARE, tiny_tokenizer(None, add_bos=True), tiny_tokenizer(UNCLOSED), tiny_tokenizer(add_bos=True)]
FIELDS = FieldNames()
EOS = CHATML.eos_token_id
words = st.text(alphabet="the cat\n?T1é", min_size=1, max_size=20)
answers = st.text(alphabet="the cat.", max_size=8)


def encode(rows, tokenizer=CHATML, fields=FIELDS, max_length=512, **settings):
    return encode_rows(rows, tokenizer, fields, max_length, **settings)


def learned(row):
    return [label for label in row["labels"] if label != -100]


def text(ids):
    return CHATML.decode(ids)


def refuse(rows, message, **settings):
    with pytest.raises(DataError, match=message) as caught:
        encode(rows, **settings)
    assert "\n" not in str(caught.value)


def test_with_a_chat_template_the_answer_and_its_end_of_turn_are_learned():
    (row,), report = encode([{"prompt": "hi", "completion": "yo"}])
    assert text(row["input_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    assert text(learned(row)) == "yo<|im_end|>"
    assert row["row"] == 1
    assert report == EncodingReport(1, 0, 0, len(row["input_ids"]), 3, len(row["input_ids"]))


def test_without_a_chat_template_the_answer_and_the_end_token_are_learned():
    for tokenizer, wanted in ((BARE, True), (CHATML, False)):
        (row,), _ = encode([{"prompt": "the cat", "completion": "the hat"}], tokenizer, chat_template=wanted)
        assert row["input_ids"] == [*BARE("the cat the hat")["input_ids"], EOS]
        assert text(learned(row)) == " the hat<|im_end|>"


def test_all_turns_of_the_assistant_are_learned():
    messages = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    (row,), _ = encode([{"messages": messages}])
    assert text(learned(row)) == "b<|im_end|>d<|im_end|>"
    assert row["input_ids"] == CHATML.apply_chat_template(messages)["input_ids"][:-1]


def test_plain_text_is_learned_whole():
    for tokenizer in (CHATML, BARE):
        (row,), _ = encode([{"text": "the cat"}], tokenizer)
        assert row["input_ids"] == row["labels"] == [*BARE("the cat")["input_ids"], EOS]


def test_plain_text_begins_as_the_tokenizer_begins_it_even_beside_a_chat_template():
    (row,), _ = encode([{"text": "the cat"}], tiny_tokenizer(add_bos=True))
    assert row["input_ids"] == [1, *BARE("the cat")["input_ids"], EOS]
    (row,), _ = encode([{"prompt": "a", "completion": "b"}], tiny_tokenizer(add_bos=True))
    assert row["input_ids"] == encode([{"prompt": "a", "completion": "b"}])[0][0]["input_ids"], "the template begins it"


def test_prompts_are_learned_too_if_asked_for():
    (row,), report = encode([{"prompt": "hi", "completion": "yo"}], completion_only=False)
    assert row["labels"] == row["input_ids"]
    assert report.labelled_tokens == report.tokens - 1, "nothing predicts the first token"


def test_a_template_and_named_fields_reach_the_tokens():
    rows = [{"q": "hi", "a": "yo"}]
    (row,), _ = encode(rows, BARE, FieldNames(template="Q: {q}\nA:", completion="a"))
    assert text(row["input_ids"]) == "Q: hi\nA: yo<|im_end|>"


def test_rows_from_files_carry_their_line_and_others_their_number():
    rows = [Row({"text": "a"}, "rows.jsonl", 5), {"text": "b"}]
    assert [row["row"] for row in encode(rows)[0]] == [5, 2]
    classified = [Row({"text": "a", "label": 0}, "rows.jsonl", 5), {"text": "b", "label": 1}]
    assert [row["row"] for row in encode_classification(classified, CHATML, FIELDS, 9)[0]] == [5, 2]


def test_faults_of_a_row_name_its_file_and_line():
    refuse(
        [{"text": "a"}, Row({"txt": "a"}, "rows.jsonl", 9)], r"rows\.jsonl, line 9: no format fits.* 'txt'; .*text=txt"
    )


def test_an_empty_prompt_is_refused_unless_something_stands_before_the_answer():
    rows = [{"prompt": "", "completion": "a"}]
    refuse(rows, "row 1: the prompt is empty", tokenizer=BARE)
    assert encode(rows, tiny_tokenizer(None, add_bos=True))[0][0]["input_ids"][0] == 1
    assert encode(rows)[0]


@property_test
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": words, "completion": answers}), min_size=1, max_size=4),
    which=st.integers(0, len(TOKENIZERS) - 1),
    template=st.sampled_from([None, "{prompt}\n", "Q: {prompt} A:"]),
)
def test_what_is_read_before_an_answer_is_the_same_in_training_and_generation(rows, which, template):
    tokenizer, fields = TOKENIZERS[which], FieldNames(template=template)
    encoded, report = encode(rows, tokenizer, fields)
    prompts = encode_prompts(rows, tokenizer, fields, 512)
    assert report.examples == len(rows)
    assert report.tokens == sum(len(row["input_ids"]) for row in encoded)
    assert report.labelled_tokens == sum(len(learned(row)) for row in encoded)
    for row, prompt, encoded_row in zip(rows, prompts, encoded, strict=True):
        asked = row["prompt"] if template is None else template.replace("{prompt}", row["prompt"])
        assert prompt.input_ids == prompt_ids(asked, tokenizer)
        assert prompt.target == row["completion"]
        length = len(prompt.input_ids)
        assert encoded_row["input_ids"][:length] == prompt.input_ids
        assert encoded_row["labels"] == [-100] * length + encoded_row["input_ids"][length:]
        assert encoded_row["input_ids"][-1] == EOS
        answer = tokenizer.decode(encoded_row["input_ids"][length:], skip_special_tokens=True)
        assert answer.strip() == row["completion"].strip()


@property_test
@given(prompt=words, completion=answers, max_length=st.integers(2, 60), which=st.integers(0, len(TOKENIZERS) - 1))
def test_truncation_leaves_the_answer_whole_and_the_same_prompt_for_generation(prompt, completion, max_length, which):
    tokenizer, rows = TOKENIZERS[which], [{"prompt": prompt, "completion": completion}]
    (whole,), _ = encode(rows, tokenizer)
    if len(learned(whole)) >= max_length:
        refuse(
            rows,
            f"row 1: the answer alone has {len(learned(whole))} tokens",
            tokenizer=tokenizer,
            max_length=max_length,
        )
        return
    (row,), report = encode(rows, tokenizer, max_length=max_length)
    assert len(row["input_ids"]) == min(max_length, len(whole["input_ids"]))
    assert report.truncated == (len(whole["input_ids"]) > max_length)
    assert learned(row) == learned(whole)
    assert row["input_ids"][: -len(learned(row))] == encode_prompts(rows, tokenizer, FIELDS, max_length)[0].input_ids


ROWS = [{"prompt": "a" * length, "completion": "b"} for length in (3, 30, 4, 40)]


def test_rows_that_are_too_long_can_be_dropped():
    encoded, report = encode(ROWS, BARE, max_length=10, overlong="drop")
    assert [row["row"] for row in encoded] == [1, 3]
    assert (report.examples, report.dropped, report.truncated) == (2, 2, 0)


def test_rows_that_are_too_long_can_be_cut():
    encoded, report = encode(ROWS, BARE, max_length=10, overlong="truncate")
    assert [len(row["input_ids"]) for row in encoded] == [6, 10, 7, 10]
    assert (report.examples, report.dropped, report.truncated, report.longest) == (4, 0, 2, 10)


def test_rows_that_are_too_long_can_be_an_error():
    refuse(
        ROWS, r"row 2: 33 tokens, of which data\.max_length allows 10", max_length=10, overlong="error", tokenizer=BARE
    )


def test_a_row_of_exactly_the_limit_is_not_too_long():
    for overlong in ("error", "drop", "truncate"):
        encoded, report = encode(ROWS[:1], BARE, max_length=6, overlong=overlong)
        assert len(encoded[0]["input_ids"]) == 6
        assert (report.examples, report.dropped, report.truncated) == (1, 0, 0)


def test_dropping_all_rows_is_an_error():
    refuse(ROWS, "all 4 rows are longer than 3 tokens", max_length=3, overlong="drop", tokenizer=BARE)
    with pytest.raises(DataError, match="all 1 rows are longer than 2 tokens"):
        encode_classification([{"text": "abc", "label": 0}], CHATML, FIELDS, 2, "drop")


def test_classes_are_read_with_the_texts_tokens():
    rows = [{"text": "the cat", "label": 2}, {"text": "a", "label": 0}]
    tokenizer = tiny_tokenizer(add_bos=True)
    encoded, report = encode_classification(rows, tokenizer, FIELDS, 20)
    assert encoded[0] == {"input_ids": [1, *BARE("the cat")["input_ids"]], "labels": 2, "row": 1}
    assert encoded[1] == {"input_ids": [1, *BARE("a")["input_ids"]], "labels": 0, "row": 2}
    assert (report.examples, report.labelled_tokens) == (2, 2)


def test_texts_to_classify_lose_their_end_if_too_long():
    rows = [{"text": "abcdef", "label": 1}, {"text": "a", "label": 0}]
    tokenizer = tiny_tokenizer(add_bos=True)
    whole = tokenizer("abcdef")["input_ids"]
    encoded, report = encode_classification(rows, tokenizer, FIELDS, 4, "truncate")
    assert encoded[0]["input_ids"] == whole[:4]
    assert (report.truncated, report.dropped) == (1, 0)
    encoded, report = encode_classification(rows, tokenizer, FIELDS, 4, "drop")
    assert [(row["row"], row["labels"]) for row in encoded] == [(2, 0)]
    assert (report.truncated, report.dropped) == (0, 1)
    with pytest.raises(DataError, match="row 1: 7 tokens, of which"):
        encode_classification(rows, tokenizer, FIELDS, 4, "error")


def test_an_empty_text_to_classify_is_refused():
    with pytest.raises(DataError, match="row 2: the text is empty"):
        encode_classification([{"text": "a", "label": 0}, {"text": "", "label": 0}], CHATML, FIELDS, 4)


def test_prompts_of_conversations_end_before_the_last_answer():
    messages = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    (prompt,) = encode_prompts([{"messages": messages}], CHATML, FIELDS, 512)
    expected = CHATML.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert prompt == EncodedPrompt(expected, "d")


def test_plain_text_has_no_prompt():
    with pytest.raises(DataError, match="row 1: plain text has no answer"):
        encode_prompts([{"text": "a"}], CHATML, FIELDS, 512)


def test_prompts_that_are_no_text_are_refused():
    with pytest.raises(DataError, match="the prompt is not UTF-8 text"):
        prompt_ids("caf\udce9", CHATML)


def test_no_rows_are_no_error_here():
    assert encode([]) == ([], EncodingReport(0, 0, 0, 0, 0, 0))


def test_the_report_is_one_line_that_leaves_out_what_did_not_happen():
    assert str(EncodingReport(1000, 0, 0, 54321, 6000, 62)) == (
        "1,000 examples, 54,321 tokens (6,000 labelled), longest 62"
    )
    assert str(EncodingReport(7, 2, 3, 50, 6, 9)) == (
        "7 examples, 50 tokens (6 labelled), longest 9, 3 cut to the limit, 2 dropped as too long"
    )


def test_the_shipped_data_encodes():
    rows = load_rows("clinc150-demo", "validation", limit=50)
    encoded, report = encode(rows, BARE, FieldNames(template="Request: {prompt}\nIntent:"))
    assert report.examples == 50
    assert text(encoded[0]["input_ids"]) == f"Request: {rows[0]['prompt']}\nIntent: {rows[0]['completion']}<|im_end|>"
