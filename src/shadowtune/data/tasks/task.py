"""A task's rows: prompt, answer and all answers that count as right, the same ones wherever it runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from shadowtune.config.checking import nearest
from shadowtune.config.loading import load_config
from shadowtune.config.task import PARTS, RowSource, TaskConfig
from shadowtune.data.carving import carve, digest
from shadowtune.data.prompts import field_of, fill_template, place_of
from shadowtune.data.sources import Row, check_limit, has_splits, load_rows
from shadowtune.data.tasks.readers import read_fields
from shadowtune.errors import ConfigError, DataError

_FILES = resources.files("shadowtune.data.tasks")
SHIPPED_TASKS = tuple(
    sorted(file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml"))
)
"""Names of the tasks in the package."""


@dataclass(frozen=True)
class Task:
    """A task, ready to give its rows."""

    config: TaskConfig

    def rows(self, part: str, directory: str | None = None, limit: int | None = None) -> list[Row]:
        """Return the rows of one part, in an order that looks random and is always the same.

        So the first rows are a fair sample even of a file sorted by class, and a larger sample contains a smaller one.

        Args:
            part: "train", "validation" or "test". Where the data set has no split for one of the latter two, it is
                taken out of the training rows, equal rows together.
            directory: a directory of data sets; None takes the rows from the task's own source.
            limit: at most so many rows.

        Returns:
            Rows with "prompt", "completion", "references" (a list of texts) and, if the task has labels, "label".

        Raises:
            DataError: naming the row at fault; or if the source or the split does not exist, or is empty.
            ConfigError: if a directory is given and the task does not say which of its folders it needs.
        """
        if part not in PARTS:
            raise DataError(
                f"task {self.config.name} has no part {part!r}{nearest(part, PARTS)}; it has {', '.join(PARTS)}"
            )
        check_limit(limit)
        place = self._place(directory)
        splits = {"train": place.train, "validation": place.validation, "test": place.test}
        split = splits[part]
        carved = [name for name in ("validation", "test") if splits[name] is None]
        rows = sorted(load_rows(place.source, split or place.train), key=digest)
        if part == "train" or split is None:
            rows = carve(rows, carved)[part]
        if self.config.only_labels is not None:
            rows = [row for row in rows if self._class(row) in self.config.only_labels]
        if not rows:
            raise DataError(f"{place.source} has too few rows for the part {part!r} of task {self.config.name}")
        return [self._make(row, index) for index, row in enumerate(rows[:limit])]

    def _class(self, raw: Row) -> str:
        """Return the name of a raw row's class."""
        assert self.config.labels is not None
        fields = read_fields(raw, self.config, place_of(raw, 0))
        return self.config.labels[fields["label"]]

    def _place(self, directory: str | None) -> RowSource:
        """Return where the rows are."""
        name, place = self.config.name, self.config.rows
        if directory is not None:
            if self.config.local is None:
                raise ConfigError(
                    f"task {name} has its rows from {place.source} alone, not from a directory of data sets; leave out "
                    f"the directory {directory}"
                )
            place = self.config.local
            place = RowSource(os.path.join(directory, place.source), place.train, place.validation, place.test)
        if not has_splits(place.source) and (place.validation is not None or place.test is not None):
            raise ConfigError(
                f"task {name}: {place.source} is a single file, whose rows would be for training and for testing at "
                "once; set its validation and test to null, and rows of it are kept for them"
            )
        return place

    def _make(self, raw: Row, index: int) -> Row:
        """Turn a raw row into prompt, completion and references."""
        config, place = self.config, place_of(raw, index)
        fields = read_fields(raw, config, place)
        completion = fill_template(config.completion, fields, place)
        made: dict[str, Any] = {"prompt": fill_template(config.prompt, fields, place), "completion": completion}
        made["references"] = [completion] if config.references is None else self._references(fields, place)
        if config.labels is not None:
            made["label"] = fields["label"]
        return Row(made, raw.origin, raw.number)

    def _references(self, fields: Mapping[str, Any], place: str) -> list[str]:
        """Return the answers that count as right, which a field lists."""
        name = self.config.references or ""
        references = field_of(fields, name, place)
        if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
            raise DataError(f"{place}: {name} must be a list of texts, got {references!r}")
        return references


def load_task(name: str) -> Task:
    """Load a task that we ship, or one of a user's own.

    Args:
        name: one of ``SHIPPED_TASKS``, or a .yaml file with the fields of ``TaskConfig``.

    Raises:
        ConfigError: if there is none of that name, or the file is malformed.
    """
    if name in SHIPPED_TASKS:
        with resources.as_file(_FILES / f"{name}.yaml") as file:
            return Task(load_config(TaskConfig, file, []))
    if Path(name).suffix in (".yaml", ".yml"):
        return Task(load_config(TaskConfig, name, []))
    raise ConfigError(
        f"there is no task {name!r}{nearest(name, SHIPPED_TASKS)}; it must be one of {', '.join(SHIPPED_TASKS)}, or a "
        ".yaml file of your own"
    )
