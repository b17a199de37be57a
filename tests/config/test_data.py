import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.config.data import DataConfig, RowSource, TaskConfig, parse_template
from shadowtune.errors import ConfigError
from tests.support.properties import property_test


@pytest.mark.parametrize("other", ["prompt_field", "text_field"])
def test_a_template_and_the_field_it_replaces_do_not_go_together(other):
    with pytest.raises(ConfigError, match="template replaces prompt_field and text_field"):
        DataConfig(train="rows.jsonl", template="{text}", **{other: "question"})
    assert DataConfig(train="rows.jsonl", template="{text}", completion_field="answer").template == "{text}"


def test_a_malformed_template_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"template 'Request: \{text'"):
        DataConfig(train="rows.jsonl", template="Request: {text")


@pytest.mark.parametrize("other", ["template", "prompt_field", "completion_field"])
def test_blocks_are_of_plain_text(other):
    with pytest.raises(ConfigError, match=f"block_size=8 joins plain texts, which have no {other}"):
        DataConfig(train="rows.jsonl", block_size=8, **{other: "{question}"})
    assert DataConfig(train="rows.jsonl", block_size=8, text_field="story").block_size == 8


def test_rows_come_from_a_data_set_or_a_task():
    with pytest.raises(ConfigError, match="has no rows: set train to a file or data set, or task to a task"):
        DataConfig()
    assert DataConfig(task="gsm8k", directory="data").source == "gsm8k"
    assert DataConfig(train="rows.jsonl").source == "rows.jsonl"
    with pytest.raises(ConfigError, match="directory=data holds the data sets of tasks; set task, or leave it out"):
        DataConfig(train="rows.jsonl", directory="data")


def test_what_a_task_brings_is_not_set_beside_it():
    with pytest.raises(ConfigError, match="task=gsm8k brings its own train, template, completion_field; leave out"):
        DataConfig(task="gsm8k", train="rows.jsonl", template="{text}", completion_field="answer")
    for name in ("train_split", "validation_split", "prompt_field", "text_field", "label_field"):
        with pytest.raises(ConfigError, match=f"brings its own {name}"):
            DataConfig(task="gsm8k", **{name: "other"})
    with pytest.raises(ConfigError, match="brings its own block_size"):
        DataConfig(task="gsm8k", block_size=8)
    data = DataConfig(task="gsm8k", max_length=64, chat_template=False, limit=3, validation="task", validation_limit=2)
    assert (data.max_length, data.validation_limit) == (64, 2)


def test_a_task_validates_on_its_own_rows():
    with pytest.raises(ConfigError, match=r"validation=rows\.jsonl does not go with task=gsm8k; set validation=task"):
        DataConfig(task="gsm8k", validation="rows.jsonl")


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("validation_limit", 0), ("max_length", 1)])
def test_numbers_of_the_data_have_their_bounds(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be at least"):
        DataConfig(train="rows.jsonl", **{name: value})


TASK = {"name": "mine", "prompt": "{text}:", "completion": "{team}", "rows": RowSource("rows.jsonl", test=None)}


def test_a_task_needs_a_name_two_templates_and_rows():
    task = TaskConfig(**TASK)
    assert (task.metric, task.labels, task.max_new_tokens) == ("exact_match", None, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "Question"}, "names no field"),
        ({"completion": "{a.b}"}, "plain names"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_characters": 0}, "max_characters must be at least 1"),
        ({"version": 0}, "version must be at least 1"),
        ({"labels": ["a", "b", "a"]}, "labels has a twice"),
        ({"labels": ["a"], "label_words": {"b": "bee", "a": "A"}}, "label_words has b, which labels does not"),
        ({"label_words": {"b": "bee"}}, "label_words has b"),
    ],
)
def test_what_is_out_of_range_or_contradicts_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        TaskConfig(**{**TASK, **settings})


@pytest.mark.parametrize("splits", [{"test": "train"}, {"validation": "test"}, {"validation": "x", "test": "x"}])
def test_no_split_is_two_parts(splits):
    with pytest.raises(ConfigError, match="must be different splits; null takes rows out of"):
        RowSource("data", **splits)
    assert RowSource("data", validation=None, test=None).train == "train"


def test_pieces_are_literal_text_and_the_field_after_it():
    assert parse_template("Request: {text}\nIntent:") == [("Request: ", "text"), ("\nIntent:", None)]
    assert parse_template("{a}{b c}") == [("", "a"), ("", "b c")]


def test_doubled_braces_are_literal():
    pieces = parse_template('{{"q": "{question}"}}')
    assert "".join(literal + (f"<{name}>" if name else "") for literal, name in pieces) == '{"q": "<question>"}'


@pytest.mark.parametrize(
    "template",
    ["{text.upper}", "{text[0]}", "{text!r}", "{text:>10}", "{}", "{a:{b}}", "{__class__.__init__}"],
)
def test_anything_but_a_plain_name_is_refused(template):
    with pytest.raises(ConfigError, match="only plain names"):
        parse_template(template)


@pytest.mark.parametrize("template", ["{text", "text}", "{{text}", "{a!}", "{"])
def test_unmatched_braces_are_refused_with_the_way_out(template):
    with pytest.raises(ConfigError, match=r"write \{\{ and \}\} for literal braces"):
        parse_template(template)


@pytest.mark.parametrize("template", ["", "no field", "{{text}}"])
def test_a_template_without_a_field_is_refused(template):
    with pytest.raises(ConfigError, match="names no field"):
        parse_template(template)


@property_test
@given(st.text())
def test_any_text_is_a_template_with_a_field_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert any(name for _, name in parse_template(text))


def test_line_breaks_do_not_break_the_line():
    with pytest.raises(ConfigError) as caught:
        parse_template("a\nb")
    assert "\n" not in str(caught.value)
