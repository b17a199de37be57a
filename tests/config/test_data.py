import pytest

from shadowtune.config.data import DataConfig
from shadowtune.errors import ConfigError


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
