"""From a raw row to flat fields that a template can name."""

from collections.abc import Callable, Mapping
from typing import Any

from shadowtune.config.checking import nearest
from shadowtune.config.task import TaskConfig
from shadowtune.data.prompts import field_of
from shadowtune.errors import DataError

UNANSWERABLE = "unanswerable"
"""The answer to a question that its context does not answer."""
LETTERS = "ABCD"


def read_fields(row: Mapping[str, Any], task: TaskConfig, place: str) -> dict[str, Any]:
    """Return a row's flat fields: renamed, read by the task's reader, cut, and with the class if the task has classes.

    Args:
        row: as ``load_rows`` gives it.
        task: its settings.
        place: names the row in errors.

    Raises:
        DataError: if a field is missing or holds something else than it should.
    """
    renamed = {(task.rename or {}).get(name, name): value for name, value in row.items()}
    fields = READERS[task.reader](renamed, place)
    if task.max_characters is not None:
        cut = slice(task.max_characters)
        fields = {name: value[cut] if isinstance(value, str) else value for name, value in fields.items()}
    return fields if task.labels is None else {**fields, **_class_of(fields, task, place)}


def _class_of(fields: Mapping[str, Any], task: TaskConfig, place: str) -> dict[str, Any]:
    """Return the number and the words of a row's class."""
    labels = task.labels or []
    value = field_of(fields, task.label_field, place)
    if isinstance(value, str) and value in labels:
        number = labels.index(value)
    elif type(value) is int and 0 <= value < len(labels):
        number = value
    else:
        raise DataError(
            f"{place}: {task.label_field} is {value!r}, which is none of the {len(labels)} labels of task {task.name}"
            f"{nearest(value, labels)}"
        )
    name = labels[number]
    return {"label": number, "label_name": (task.label_words or {}).get(name, name.replace("_", " "))}


def _read_squad(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Read a question of SQuAD v2, whose answers are a list of texts, or as on the Hub a mapping with such a list."""
    answers = field_of(row, "answers", place)
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: answers must be a list of texts, got {texts!r}")
    texts = texts or [UNANSWERABLE]
    return {**row, "answer": texts[0], "answers": texts}


def _read_mmlu(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Read a question with four choices and the number of the right one."""
    choices, answer = field_of(row, "choices", place), field_of(row, "answer", place)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise DataError(f"{place}: choices must be a list of {len(LETTERS)}, got {choices!r}")
    if type(answer) is not int or answer not in range(len(LETTERS)):
        raise DataError(f"{place}: answer must be the number of a choice, from 0 to {len(LETTERS) - 1}, got {answer!r}")
    return {**row, **dict(zip(LETTERS, choices, strict=True)), "letter": LETTERS[answer]}


READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "fields": lambda row, place: dict(row),
    "squad": _read_squad,
    "mmlu": _read_mmlu,
}
"""By ``TaskConfig.reader``."""
