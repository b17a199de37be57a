import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.config.training import DataConfig
from shadowtune.data.examples import (
    Completion,
    Conversation,
    FieldNames,
    PlainText,
    fill_template,
    text_field,
)
from shadowtune.data.formats import read_example, read_labelled
from shadowtune.data.sources import Row, row_location
from shadowtune.errors import DataError
from tests.support.properties import property_test

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def read(row, **fields):
    return read_example(row, FieldNames(**fields), "rows.jsonl, line 7")


def refuse(row, message, **fields):
    with pytest.raises(DataError, match=message) as caught:
        read(row, **fields)
    assert str(caught.value).startswith("rows.jsonl, line 7")
    assert "\n" not in str(caught.value)


def test_the_usual_names():
    assert read({"messages": [USER, ASSISTANT]}) == Conversation([USER, ASSISTANT])
    assert read({"prompt": "a", "completion": "b"}) == Completion("a", "b")
    assert read({"text": "a"}) == PlainText("a")


def test_messages_come_before_prompt_and_completion_and_those_before_text():
    row = {"text": "t", "prompt": "a", "completion": "b", "messages": [USER, ASSISTANT]}
    assert read(row) == Conversation([USER, ASSISTANT])
    del row["messages"]
    assert read(row) == Completion("a", "b")
    del row["completion"]
    assert read(row) == PlainText("t")


def test_named_fields_decide():
    row = {"text": "t", "prompt": "a", "completion": "b", "question": "q", "answer": "w", "messages": [USER]}
    assert read(row, prompt="question", completion="answer") == Completion("q", "w")
    assert read(row, prompt="question") == Completion("q", "b")
    assert read(row, completion="answer") == Completion("a", "w")
    assert read(row, text="question") == PlainText("q")


def test_a_template_makes_the_prompt_of_any_fields():
    row = {"q": "why", "context": "{x}", "n": 3, "completion": "c", "a": "because", "messages": [USER]}
    assert read(row, template="{context}: {q}? {{{n}}}") == Completion("{x}: why? {3}", "c")
    assert read(row, template="{q}", completion="a") == Completion("why", "because")


def test_prompt_and_completion_may_be_messages_of_which_only_the_completion_is_learned():
    assert read({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}) == Conversation(
        [USER, ASSISTANT, USER, ASSISTANT], first_learned=3
    )


def test_a_row_with_none_of_the_fields_names_those_it_has_and_the_way_out():
    refuse(
        {"question": "a", "answer": "b"},
        r"no format fits the columns 'question', 'answer'; .*data\.columns\.prompt=question data\.columns\.comp",
    )
    refuse({}, "columns no fields; .*data.template")


def test_a_missing_named_field_gets_the_nearest():
    refuse({"questoin": "a"}, r"no field 'question' \(did you mean questoin\?\); it has 'questoin'", prompt="question")
    refuse({"q": "a"}, "no field 'completion'; it has 'q'", prompt="q")
    refuse({"q": "a"}, "no field 'x'", template="{x}")
    refuse({"q": "a"}, "no field 'body'", text="body")


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, True])
def test_fields_that_are_no_text_are_refused_with_their_value(value):
    refuse({"text": value}, "text must be text, got")
    refuse({"prompt": "a", "completion": value}, "completion must be text, got")
    refuse({"x": value, "completion": "b"}, "x must be text, got", template="{x}")


def test_numbers_are_text():
    assert read({"prompt": "1+1", "completion": 2}) == Completion("1+1", "2")
    assert text_field({"a": 0.5}, "a", "") == "0.5"


def test_long_values_are_shortened_in_messages():
    with pytest.raises(DataError) as caught:
        text_field({"a": ["x" * 1000]}, "a", "here")
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages must be a list of messages, got 'hi'"),
        ([], "messages must be a list of messages"),
        ([USER, "yo"], "message 2 of messages must hold role and content, got 'yo'"),
        ([{"role": "user"}], "message 1 of messages: no field 'content'; it has 'role'"),
        ([USER, {"content": "a"}], "message 2 of messages: no field 'role'"),
        ([{"role": "user", "content": None}], "content of message 1 must be text, got None"),
        ([{"role": 3, "content": "a"}], "role of message 1 must be text, got 3"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of message 1 must be text"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    refuse({"messages": messages}, message)


def test_the_completion_of_a_list_prompt_must_be_a_list():
    refuse({"prompt": [USER], "completion": "yo"}, "completion must be a list of messages, got 'yo'")


def test_classified_rows_are_text_and_class():
    read_row = {"text": "a", "label": 2, "body": "b", "class": 0}
    assert read_labelled(read_row, FieldNames(), "") == ("a", 2)
    assert read_labelled(read_row, FieldNames(text="body", label="class"), "") == ("b", 0)
    assert read_labelled(read_row, FieldNames(template="<{body}>"), "") == ("<b>", 2)


@pytest.mark.parametrize("label", [None, "", float("nan")])
def test_a_missing_label_is_named(label):
    with pytest.raises(DataError, match=r"here: the label \(label\) is missing; give every row one"):
        read_labelled({"text": "a", "label": label}, FieldNames(), "here")


def test_missing_text_or_label_is_named():
    with pytest.raises(DataError, match="here: no field 'text'"):
        read_labelled({"label": 1}, FieldNames(), "here")
    with pytest.raises(DataError, match=r"here: no field 'label' \(did you mean labels\?\)"):
        read_labelled({"text": "a", "labels": 1}, FieldNames(), "here")


def test_field_names_come_from_the_settings():
    names = FieldNames.from_config(DataConfig(train="x", prompt_field="p", completion_field="c", text_field="t"))
    assert names == FieldNames(prompt="p", completion="c", text="t")
    names = FieldNames.from_config(DataConfig(train="x", label_field="l", template="{a}"))
    assert names == FieldNames(label="l", template="{a}")


def test_places_name_file_and_line_or_the_number():
    assert row_location(Row({}, "rows.jsonl", 7), 3) == "rows.jsonl, line 7"
    assert row_location({}, 3) == "row 4"


@property_test
@given(value=st.text(), before=st.text(), after=st.text())
def test_templates_put_text_in_untouched(value, before, after):
    template = before.replace("{", "{{").replace("}", "}}") + "{x}" + after.replace("{", "{{").replace("}", "}}")
    assert fill_template(template, {"x": value}, "") == before + value + after
