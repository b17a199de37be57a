import pytest

from shadowtune.config.task import RowSource, TaskConfig
from shadowtune.errors import ConfigError

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
