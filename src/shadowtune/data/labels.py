"""Labels of classification: what is predicted (a class, several, a number), the names of the classes, their weights."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shadowtune.config.data import ProblemType
from shadowtune.config.settings import nearest
from shadowtune.data.examples import FieldNames, shorten
from shadowtune.data.sources import Row
from shadowtune.errors import DataError

SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"
SHOWN = 6
"""Number of classes that a message names."""
Value = tuple[Any, str]
"""A label as read, and what names its row."""


@dataclass(frozen=True)
class Labels:
    """How the labels of rows become numbers."""

    problem_type: ProblemType = SINGLE
    names: tuple[str, ...] | None = None
    """Names of the classes by number; None if they are only numbers."""
    count: int | None = None
    """Number of classes; 1 of regression, None if a class may have any number."""

    @classmethod
    def learned_from(
        cls, values: Sequence[Value], names: Sequence[str] | None, problem_type: ProblemType | None = None
    ) -> "Labels":
        """Derive the labels' kind and, unless they are given, the names of the classes from the training examples.

        Lists are several classes per example, fractions are regression, text and whole numbers are classes.

        Raises:
            DataError: naming the first row whose label is of another kind than those before.
        """
        kind = _kind(values)
        chosen = problem_type or (MULTI if kind.startswith("list") else REGRESSION if kind == "fraction" else SINGLE)
        if chosen == REGRESSION:
            return cls(REGRESSION, None, 1)
        if kind == "list of indicators":
            return cls(MULTI, None if names is None else tuple(names), len(values[0][0]))
        if kind == "fraction" or (kind.startswith("list") and chosen == SINGLE):
            raise DataError(f"{values[0][1]}: problem_type={chosen} needs classes, got {shorten(values[0][0])}")
        each = [item for value, _ in values for item in (value if isinstance(value, list) else [value])]
        if names is None and not kind.endswith("number"):
            names = sorted({_text(item) for item in each})
            if chosen == SINGLE and len(names) == 1:
                raise DataError(f"all {len(values)} labels are {names[0]!r}, so there is nothing to tell apart")
        if names is not None:
            return cls(chosen, tuple(names), len(names))
        return cls(chosen, None, 1 + max(map(int, each), default=0) if chosen == MULTI else None)

    @classmethod
    def of_model(cls, config: PreTrainedConfig) -> "Labels":
        """Return the labels that a classifier's config records."""
        known: dict[Any, str] = dict(config.id2label or {})
        names = tuple(known[number] for number in range(len(known)))
        unnamed = names == tuple(f"LABEL_{number}" for number in range(len(names)))
        kind = config.problem_type or (REGRESSION if len(names) == 1 else SINGLE)
        return cls(kind, None if unnamed else names, len(names))

    def encode(self, value: Any, where: str) -> int | float | list[float]:
        """Return a class as an int from 0, several as a list of zeros and ones, or a number of regression.

        Raises:
            DataError: naming the row, if the label is of another kind or no class.
        """
        if self.problem_type == REGRESSION:
            number = _number(value)
            if number is None:
                raise DataError(f"{where}: the label must be a finite number (regression), got {shorten(value)}")
            return number
        if self.problem_type == SINGLE:
            return self._class(value, where)
        items = value if isinstance(value, list) else [value]
        if _kind_of(items) == "list of indicators":
            if len(items) != self.count:
                raise DataError(f"{where}: {len(items)} zeros and ones for {self.count} classes")
            return [float(item) for item in items]
        chosen = {self._class(item, where) for item in items}
        return [float(number in chosen) for number in range(self.count or 0)]

    def name(self, number: int) -> str:
        """Return the name of a class, or its number as text."""
        return self.names[number] if self.names is not None and number < len(self.names) else str(number)

    def model_arguments(self, num_labels: int) -> dict[str, Any]:
        """Return the fields of a classifier's config that record these labels; classes without a name are numbered."""
        fields: dict[str, Any] = {}
        if self.problem_type != SINGLE:
            fields["problem_type"] = self.problem_type
        if self.names is not None:
            names = [*self.names, *(f"LABEL_{number}" for number in range(len(self.names), num_labels))]
            fields["id2label"] = dict(enumerate(names))
            fields["label2id"] = {name: number for number, name in enumerate(names)}
        return fields

    def __str__(self) -> str:
        if self.problem_type == REGRESSION:
            return "numbers (regression)"
        several = ", several per example" if self.problem_type == MULTI else ""
        if self.names is None:
            return f"classes by number{several}"
        shown = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
        return f"{len(self.names)} classes{several} ({shown})"

    def _class(self, value: Any, where: str) -> int:
        if self.names is not None and isinstance(value, str | bool) and _text(value) in self.names:
            return self.names.index(_text(value))
        number = int(value) if isinstance(value, str) and _is_whole(value) else value
        if isinstance(number, int) and not isinstance(number, bool) and number in range(self.count or number + 1):
            return number
        if self.names is None:
            top = "" if self.count is None else f" to {self.count - 1}"
            raise DataError(f"{where}: label must be the number of a class, from 0{top}, got {shorten(value)}")
        known = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
        raise DataError(
            f"{where}: the label {shorten(value)} is none of the {len(self.names)} classes ({known})"
            f"{nearest(value, self.names)}; name all classes in data.label_names"
        )


def label_values(rows: Sequence[Mapping[str, Any]], values: Iterable[Value], fields: FieldNames) -> list[Value]:
    """Split labels at ``fields.label_separator``, and replace numbers by the class names that their data set has."""
    name, separator, made = fields.label or "label", fields.label_separator, []
    for row, (value, where) in zip(rows, values, strict=True):
        if separator is not None and isinstance(value, str):
            value = [part.strip() for part in value.split(separator) if part.strip()]
        classes = row.classes.get(name) if isinstance(row, Row) else None
        if classes is not None:
            items = value if isinstance(value, list) else [value]
            if wrong := [item for item in items if item not in range(len(classes))]:
                raise DataError(f"{where}: the label {wrong[0]!r} is no class of the data set; leave the row out")
            value = [classes[item] for item in items] if isinstance(value, list) else classes[value]
        made.append((value, where))
    return made


def class_names(rows: Sequence[Mapping[str, Any]], fields: FieldNames) -> Sequence[str] | None:
    """Return the names of the classes by number: those of the settings, else of the data set; None without any."""
    known = rows[0].classes.get(fields.label or "label") if rows and isinstance(rows[0], Row) else None
    return fields.label_names or known


def class_weights(
    setting: str | Mapping[str, float], labels: Labels, examples: Sequence[Mapping[str, Any]], count: int
) -> tuple[float, ...]:
    """Return the weight of each class in the loss.

    Args:
        setting: "balanced" for n / (C n_c) with the n_c examples of class c among n, or weights by name or number;
            other classes have 1.
        labels: of the examples.
        examples: the encoded training examples.
        count: number of classes C.

    Raises:
        DataError: if a class is unknown, or examples have no single class.
    """
    if labels.problem_type != SINGLE:
        raise DataError(f"class_weights needs one class per example, but the labels are {labels}; leave it out")
    if isinstance(setting, str):
        counts = Counter(example["labels"] for example in examples)
        return tuple(len(examples) / (count * counts[number]) if counts[number] else 1.0 for number in range(count))
    known = [labels.name(number) for number in range(count)]
    if unknown := [name for name in setting if name not in known]:
        raise DataError(f"class_weights has {unknown[0]!r}{nearest(unknown[0], known)}, which is no class: {labels}")
    return tuple(setting.get(name, 1.0) for name in known)


def _kind(values: Sequence[Value]) -> str:
    """Return the kind of all labels: text, number, fraction, or a list of one of these, or of indicators."""
    kinds = [_kind_of(value) for value, _ in values]
    merged = kinds[0] if kinds else "number"
    for kind, (value, where) in zip(kinds, values, strict=True):
        if kind.removeprefix("list of ") not in ("text", "number", "fraction", "indicators", "nothing"):
            raise DataError(f"{where}: a label is text, a number or a list of one of these, got {shorten(value)}")
        if kind == "list of nothing" or kind == merged:
            continue
        if merged == "list of nothing":
            merged = kind
        elif {kind, merged} == {"number", "fraction"}:
            merged = "fraction"
        else:
            raise DataError(
                f"{where}: the label {shorten(value)} is a {kind}, those before are a {merged}; labels of one data set "
                "must be of one kind"
            )
    if merged == "text" and all(isinstance(value, str) and _number(value) is not None for value, _ in values):
        return "number" if all(_is_whole(value) for value, _ in values) else "fraction"
    return merged


def _kind_of(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_kind_of(item) for item in value}
        if kinds == {"fraction"} and set(value) <= {0.0, 1.0}:
            return "list of indicators"
        return f"list of {kinds.pop() if len(kinds) == 1 else 'nothing' if not kinds else 'mixed values'}"
    if isinstance(value, str | bool):
        return "text"
    return "number" if isinstance(value, int) else "fraction" if isinstance(value, float) else type(value).__name__


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_whole(value: str) -> bool:
    return value.isascii() and value.isdecimal() and str(int(value)) == value


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
