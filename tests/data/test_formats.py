import json

import pytest

from shadowtune.data.examples import Completion, Conversation, FieldNames, PlainText
from shadowtune.data.formats import describe_formats, describe_unread, read_example, unread_fields
from shadowtune.data.sources import Row
from shadowtune.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be kind"}


def read(row, **fields):
    return read_example(row, FieldNames(**fields), "here")


def test_alpaca_joins_instruction_and_input_as_a_user_would_ask_both():
    assert read({"instruction": "add", "input": "1 2", "output": "3"}) == Completion("add\n\n1 2", "3")
    for empty in ({"input": ""}, {"input": None}, {}):
        assert read({"instruction": "add", "output": "3", **empty}) == Completion("add", "3")
    row = {"instruction": "hi", "output": "yo", "system": "be kind"}
    assert read(row) == Conversation([SYSTEM, USER, ASSISTANT])


def test_sharegpt_turns_become_messages_and_a_first_answer_is_not_learned():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert read({"conversations": turns}) == Conversation([USER, ASSISTANT])
    assert read({"conversations": json.dumps(turns)}) == Conversation([USER, ASSISTANT])
    assert read({"messages": turns}) == Conversation([USER, ASSISTANT])
    assert read({"conversations": [USER, ASSISTANT], "system": "be kind"}) == Conversation([SYSTEM, USER, ASSISTANT])
    first = read({"conversations": [turns[1], *turns]})
    assert [message.get("weight") for message in first.messages] == [0, None, None]


def test_sharegpt_tools_are_those_of_messages():
    call = {"name": "look", "arguments": {"at": "sea"}}
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "yo"},
    ]
    example = read({"conversations": turns, "tools": json.dumps([{"name": "look"}])})
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert example.tools == [{"name": "look"}]
    with pytest.raises(DataError, match="here: a function_call is JSON of name and arguments, got 'look'"):
        read({"conversations": [turns[0], {"from": "function_call", "value": "look"}]})


def test_content_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, ASSISTANT]}).messages[0]["content"] == "a\nb"
    with pytest.raises(DataError, match=r"content of message 1 must be text, or parts of type text, got \{'type': 'im"):
        read({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": [ASSISTANT], "rejected": [SYSTEM]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [SYSTEM]},
        {"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
    ],
    ids=["text_and_messages", "messages", "prompt_twice", "implicit"],
)
def test_the_chosen_answer_of_a_preference_is_learned(row):
    assert read(row) == Conversation([USER, ASSISTANT], first_learned=1)
    assert unread_fields(row, FieldNames()) == set()


def test_preferences_of_text():
    assert read({"prompt": "a", "chosen": "b", "rejected": "c"}) == Completion("a", "b")
    with pytest.raises(DataError, match="here: chosen is text, so the row needs a prompt"):
        read({"chosen": "b", "rejected": "c"})


def test_a_label_is_learned_as_the_answer_to_its_text_by_its_name():
    assert read({"text": "a", "label": "joy"}) == Completion("a", "joy")
    assert read({"text": "a", "label": 1}) == Completion("a", "1")
    assert read({"text": "a", "label": 1}, label_names=("no", "yes")) == Completion("a", "yes")
    assert read(Row({"text": "a", "label": 1}, "f", 1, "row", {"label": ["no", "yes"]})) == Completion("a", "yes")
    assert read({"body": "a", "class": ["x", "y"]}, text="body", label="class") == Completion("a", "x, y")
    with pytest.raises(DataError, match="here: label is 2, and there are names for 0 to 1 only"):
        read({"text": "a", "label": 2}, label_names=("no", "yes"))
    with pytest.raises(DataError, match=r"here: the label \(label\) is missing"):
        read({"text": "a", "label": None})


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"question": "a", "answer": "b"}, "data.columns.prompt=question data.columns.completion=answer"),
        ({"category": "a", "body": "b"}, "data.columns.text=body data.columns.label=category"),
        ({"words": "a"}, "data.columns.text=words"),
        ({"a": 1, "b": 2, "c": 3}, "data.columns.prompt=COLUMN data.columns.completion=COLUMN"),
        ({f"c{number}": 1 for number in range(2000)}, r"\.\.\. \(2,000 in all\)"),
    ],
)
def test_columns_of_no_format_get_the_setting_that_names_them(row, hint):
    with pytest.raises(DataError, match=hint) as caught:
        read(row)
    assert len(str(caught.value)) < 400


def test_empty_cells_and_nan_are_named():
    for value, shown in ((None, "None"), (float("nan"), "nan")):
        with pytest.raises(DataError, match=f"here: text must be text, got {shown}: the cell is empty; fill it"):
            read({"text": value})


def test_formats_are_counted_and_unread_columns_named_with_a_hint():
    rows = [{"instruction": "a", "output": "b", "id": 1}, {"text": "a"}, {"text": "b"}]
    assert describe_formats(rows, FieldNames()) == "plain text: 2 texts; Alpaca: 1 examples"
    assert unread_fields(rows[0], FieldNames()) == {"id"}
    assert describe_unread(["id", "category"]) == ("id, category (if it is a label, set data.columns.label=category)")
    assert describe_unread([f"c{number}" for number in range(1000)]).endswith("c9 and 990 others")
    assert read({"text": "a"}) == PlainText("a")
