"""Tasks: rows with a prompt, an answer and all references, the same wherever a task is used.

A task is a YAML file with the fields of ``TaskConfig``; those in this package are in the folder ``tasks``.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from shadowtune.config.data import PARTS, RowSource, TaskConfig
from shadowtune.config.loading import load_config
from shadowtune.config.settings import nearest
from shadowtune.data.examples import fill_template, require_field
from shadowtune.data.sources import Row, check_limit, has_splits, load_rows, row_digest, row_location, split_rows
from shadowtune.errors import ConfigError, DataError

_FILES = resources.files("shadowtune.data") / "tasks"
SHIPPED_TASKS = tuple(
    sorted(file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml"))
)
"""Names of the tasks in this package."""
UNANSWERABLE = "unanswerable"
"""The answer to a SQuAD question that its context does not answer."""
LETTERS = "ABCD"


@dataclass(frozen=True)
class EvaluationTask:
    """A task with its settings; loads its rows."""

    config: TaskConfig

    def rows(self, part: str, directory: str | None = None, limit: int | None = None) -> list[Row]:
        """Return the rows of one part in a fixed pseudo-random order.

        The order comes from the contents of the rows. So the first rows are a fair sample even of a file sorted by
        class, and a larger sample contains a smaller one.

        Args:
            part: "train", "validation" or "test". If the data set has no split for one of the latter two, it is held
                out from the training rows; equal rows stay together.
            directory: directory of local data sets; None uses the task's own source.
            limit: maximum number of rows.

        Returns:
            Rows with "prompt", "completion", "references" (a list of texts) and, if the task has labels, "label".

        Raises:
            DataError: naming the invalid row; or if the source or the split does not exist or is empty.
            ConfigError: if a directory is given and the task does not name its folder in it.
        """
        if part not in PARTS:
            raise DataError(
                f"task {self.config.name} has no part {part!r}{nearest(part, PARTS)}; it has {', '.join(PARTS)}"
            )
        check_limit(limit)
        source = self._source(directory)
        splits = {"train": source.train, "validation": source.validation, "test": source.test}
        split = splits[part]
        held_out = [name for name in ("validation", "test") if splits[name] is None]
        rows = sorted(load_rows(source.source, split or source.train), key=row_digest)
        if part == "train" or split is None:
            rows = split_rows(rows, held_out)[part]
        if self.config.only_labels is not None:
            rows = [row for row in rows if self._label_of(row) in self.config.only_labels]
        if not rows:
            raise DataError(f"{source.source} has too few rows for the part {part!r} of task {self.config.name}")
        return [self._convert(row, index) for index, row in enumerate(rows[:limit])]

    def _label_of(self, row: Row) -> str:
        assert self.config.labels is not None
        return self.config.labels[read_fields(row, self.config, row_location(row, 0))["label"]]

    def _source(self, directory: str | None) -> RowSource:
        name, source = self.config.name, self.config.rows
        if directory is not None:
            if self.config.local is None:
                raise ConfigError(
                    f"task {name} has its rows from {source.source} alone, not from a directory of data sets; leave "
                    f"out the directory {directory}"
                )
            local = self.config.local
            source = RowSource(os.path.join(directory, local.source), local.train, local.validation, local.test)
        if not has_splits(source.source) and (source.validation is not None or source.test is not None):
            raise ConfigError(
                f"task {name}: {source.source} is a single file, whose rows would be for training and for testing at "
                "once; set its validation and test to null, and rows of it are kept for them"
            )
        return source

    def _convert(self, row: Row, index: int) -> Row:
        """Return a row of the source as prompt, completion and references."""
        config, where = self.config, row_location(row, index)
        fields = read_fields(row, config, where)
        completion = fill_template(config.completion, fields, where)
        made: dict[str, Any] = {"prompt": fill_template(config.prompt, fields, where), "completion": completion}
        made["references"] = [completion]
        if config.references is not None:
            references = require_field(fields, config.references, where)
            made["references"] = _check_texts(references, config.references, where, empty=False)
        if config.labels is not None:
            made["label"] = fields["label"]
        return row.with_fields(made)


def load_task(name: str) -> EvaluationTask:
    """Load a task of this package, or a user's own.

    Args:
        name: one of ``SHIPPED_TASKS``, or a .yaml file with the fields of ``TaskConfig``.

    Raises:
        ConfigError: if there is no such task, or the file is malformed.
    """
    if name in SHIPPED_TASKS:
        with resources.as_file(_FILES / f"{name}.yaml") as file:
            return EvaluationTask(load_config(TaskConfig, file, []))
    if Path(name).suffix in (".yaml", ".yml"):
        return EvaluationTask(load_config(TaskConfig, name, []))
    raise ConfigError(
        f"there is no task {name!r}{nearest(name, SHIPPED_TASKS)}; it must be one of {', '.join(SHIPPED_TASKS)}, or a "
        ".yaml file of your own"
    )


def read_fields(row: Mapping[str, Any], task: TaskConfig, where: str) -> dict[str, Any]:
    """Return the flat fields of a row: renamed, converted by the task's reader, cut, and with its class.

    Args:
        row: as ``load_rows`` returns it.
        task: the settings.
        where: names the row in errors.

    Raises:
        DataError: if a field is missing or malformed.
    """
    renamed = {(task.rename or {}).get(name, name): value for name, value in row.items()}
    fields = READERS[task.reader](renamed, where)
    if task.max_characters is not None:
        cut = slice(task.max_characters)
        fields = {name: value[cut] if isinstance(value, str) else value for name, value in fields.items()}
    return fields if task.labels is None else {**fields, **_class_fields(fields, task, where)}


def _class_fields(fields: Mapping[str, Any], task: TaskConfig, where: str) -> dict[str, Any]:
    """Return "label", the number of a row's class, and "label_name", its words."""
    labels = task.labels or []
    value = require_field(fields, task.label_field, where)
    if isinstance(value, str) and value in labels:
        number = labels.index(value)
    elif type(value) is int and 0 <= value < len(labels):
        number = value
    else:
        raise DataError(
            f"{where}: {task.label_field} is {value!r}, which is none of the {len(labels)} labels of task {task.name}"
            f"{nearest(value, labels)}"
        )
    name = labels[number]
    return {"label": number, "label_name": (task.label_words or {}).get(name, name.replace("_", " "))}


def _read_squad(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """SQuAD v2: "answers" is a list of texts or, as on the Hub, a mapping with such a list."""
    answers = require_field(row, "answers", where)
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = _check_texts(texts, "answers", where, empty=True) or [UNANSWERABLE]
    return {**row, "answer": texts[0], "answers": texts}


def _read_mmlu(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """MMLU: four choices and the number of the right one."""
    choices, answer = require_field(row, "choices", where), require_field(row, "answer", where)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise DataError(f"{where}: choices must be a list of {len(LETTERS)}, got {choices!r}")
    if type(answer) is not int or answer not in range(len(LETTERS)):
        raise DataError(f"{where}: answer must be the number of a choice, from 0 to {len(LETTERS) - 1}, got {answer!r}")
    return {**row, **dict(zip(LETTERS, choices, strict=True)), "letter": LETTERS[answer]}


def _check_texts(value: Any, name: str, where: str, empty: bool) -> list[str]:
    if not isinstance(value, list) or not (value or empty) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: {name} must be a list of texts, got {value!r}")
    return value


READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "fields": lambda row, where: dict(row),
    "squad": _read_squad,
    "mmlu": _read_mmlu,
}
"""By ``TaskConfig.reader``."""
