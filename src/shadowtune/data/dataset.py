"""The data of a run: rows of its own files or of its task, and how they are encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import HOLD_OUT, DataConfig
from shadowtune.config.settings import current_value, nearest
from shadowtune.data.blocks import BlockReport, encode_blocks
from shadowtune.data.encoding import EncodedPrompt, EncodingReport, encode_classification, encode_prompts, encode_rows
from shadowtune.data.examples import FieldNames
from shadowtune.data.files import named_columns
from shadowtune.data.labels import Labels
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.sources import Row, has_splits, load_rows, parse_source, split_rows, weigh_rows
from shadowtune.data.task import EvaluationTask, load_task
from shadowtune.errors import ConfigError, DataError

MAX_LENGTH = 512
"""Tokens per example if neither the settings nor a task set a limit."""
TASK_FIELDS = FieldNames(prompt="prompt", completion="completion", text="prompt", label="label")


@dataclass(frozen=True)
class Dataset:
    """Settings of the data, and the task that they name."""

    settings: DataConfig
    task: EvaluationTask | None = None
    form: PromptFormat | None = None
    """The format read off the training data; None before that, or if nothing was trained."""
    labels: Labels | None = None
    """How training encoded the labels of classification; None before that."""

    @classmethod
    def open(cls, settings: DataConfig) -> "Dataset":
        """Load the task, if the settings name one; raises ConfigError if it does not exist."""
        return cls(settings, None if settings.task is None else load_task(settings.task))

    def of_task(self, name: str) -> "Dataset":
        """Return the data of another task, with this one's directory, length limit and chat template setting.

        Raises:
            ConfigError: if there is no such task.
        """
        data = self.settings
        other = Dataset.open(
            DataConfig(
                task=name, directory=data.directory, max_length=data.max_length, chat_template=data.chat_template
            )
        )
        if self.form is None:
            return other
        own: dict[str, Any] = {"template": other.template, "chat_template": other.chat_template}
        return replace(other, form=replace(self.form, **own, optional_fields=(), main_field=None))

    @property
    def task_version(self) -> str | None:
        """Name and version of the task, or None."""
        return None if self.task is None else f"{self.task.config.name} version {self.task.config.version}"

    @property
    def fields(self) -> FieldNames:
        """Where a row holds the parts of an example."""
        if self.task is None:
            return FieldNames.from_config(self.settings)
        labels = self.task.config.labels
        return replace(TASK_FIELDS, label_names=None if labels is None else tuple(labels))

    @property
    def template(self) -> str | None:
        """Template that makes a prompt from the fields of a row; None if the prompt is a field."""
        return self.settings.template if self.task is None else self.task.config.prompt

    @property
    def max_length(self) -> int:
        """Limit of tokens per example: of the settings, else of the task."""
        return self.settings.max_length or (MAX_LENGTH if self.task is None else self.task.config.max_length)

    @property
    def prompt_format(self) -> PromptFormat:
        """How a user's text becomes a prompt: as read off the training data, else by the settings."""
        if self.form is not None:
            return self.form
        settings = self.settings
        return PromptFormat(self.template, self.chat_template, settings.optional_fields, settings.main_field)

    @property
    def chat_template(self) -> bool:
        """Whether prompts go through the tokenizer's chat template: by the settings, else by the task."""
        if self.settings.chat_template is not None:
            return self.settings.chat_template
        return self.task is None or self.task.config.chat_template

    @property
    def num_labels(self) -> int | None:
        """Number of the task's classes; None without any."""
        labels = None if self.task is None else self.task.config.labels
        return None if labels is None else len(labels)

    @property
    def metric(self) -> str:
        """Name of the metric that scores answers."""
        return "exact_match" if self.task is None else self.task.config.metric

    @property
    def max_new_tokens(self) -> int | None:
        """Limit of tokens per answer; None means the length of the longest reference."""
        return None if self.task is None else self.task.config.max_new_tokens

    def training_rows(self) -> list[Row]:
        """Load the training rows, with the validation rows if ``learn_validation``; raises DataError."""
        settings = self.settings
        if self.task is not None:
            rows = self.task.rows("train", settings.directory, settings.limit)
        else:
            parts = [part[: settings.limit] for part in self._training_parts()]
            weights = settings.weights or (1.0,) * len(parts)
            rows = [row for part, weight in zip(parts, weights, strict=True) for row in weigh_rows(part, weight)]
            if not rows:
                raise DataError(f"data.weights leaves no row of {settings.source}; raise one of them")
        return [*rows, *(self._validation_rows() or [])] if settings.learn_validation else rows

    def validation_rows(self) -> list[Row] | None:
        """Load the rows for validation during training; None if there are none, or training learns them."""
        return None if self.settings.learn_validation else self._validation_rows()

    def _validation_rows(self) -> list[Row] | None:
        settings = self.settings
        if settings.validation is None:
            return None
        if self.task is not None:
            return self.task.rows("validation", settings.directory, settings.validation_limit)
        if settings.hold_out_share is not None:
            return self._hold_out()[: settings.validation_limit]
        return self._load([settings.validation], settings.validation_split, settings.validation_limit)[0]

    def held_out(self, split: str, source: str | None = None, limit: int | None = None) -> list[Row]:
        """Load rows that were not trained on.

        Args:
            split: of the data set, or part of the task.
            source: another data set, or "hold_out"; for a task, another directory of data sets.
            limit: maximum number of rows: of a task a random sample, otherwise the first.

        Raises:
            DataError: if the rows cannot be read, or are those of training.
        """
        if self.task is not None:
            return self.task.rows(split, source or self.settings.directory, limit)
        if current_value("validation", source) == HOLD_OUT:
            if self.settings.hold_out_share is None:
                raise DataError(
                    f"training held out no row of {self.settings.source} (data.validation is "
                    f"{self.settings.validation}); pass --data with rows of its own"
                )
            return self._hold_out()[:limit]
        if source is not None:
            return self._load([source], split, limit)[0]
        for each in self.settings.sources:
            if not has_splits(parse_source(each, split)[0]):
                hint = "" if self.settings.hold_out_share is None else f", or --data {HOLD_OUT}"
                raise DataError(
                    f"{each} holds the rows that the run was trained on; pass --data with held-out rows{hint}"
                )
        sources = [parse_source(each, split)[0] for each in self.settings.sources]
        return [row for part in self._load(sources, split, limit) for row in part][:limit]

    def _load(self, sources: Sequence[str], split: str, limit: int | None = None) -> list[list[Row]]:
        """Load the rows of each source, with the columns of the settings renamed."""
        parts = [load_rows(source, split, limit, self.settings.encoding) for source in sources]
        for name, column in self.settings.columns.items():
            if not any(column in row for part in parts for row in part):
                first = parts[0][0]
                raise DataError(
                    f"{', '.join(sources)}: no column {column!r}{nearest(column, map(str, first))} for "
                    f"data.columns.{name}; it has {named_columns(first)}"
                )
        return [[_renamed(row, self.settings.columns) for row in part] for part in parts]

    def _training_parts(self) -> list[list[Row]]:
        """Load the rows of each training source, less those held out."""
        settings = self.settings
        if settings.hold_out_share is None:
            limit = settings.limit
            return self._load(settings.sources, settings.train_split, limit)
        held_out = {id(row) for row in self._hold_out()}
        return [[row for row in part if id(row) not in held_out] for part in self._all_parts]

    @cached_property
    def _all_parts(self) -> list[list[Row]]:
        return self._load(self.settings.sources, self.settings.train_split)

    def _hold_out(self) -> list[Row]:
        """Return the rows that are held out of all training sources; equal rows of any two stay together."""
        share = self.settings.hold_out_share
        assert share is not None
        split = split_rows([row for part in self._all_parts for row in part], ["validation"], share)
        if not split["train"] or not split["validation"]:
            raise DataError(f"{self.settings.source} has too few rows to hold some back for validation; add rows")
        return split["validation"]

    def encode(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        classify: bool,
        training: bool = False,
    ) -> tuple[list[dict[str, Any]], EncodingReport | BlockReport]:
        """Encode rows with their answers or, for a classifier, their classes.

        Args:
            rows: as the methods above return them.
            tokenizer: of the model.
            classify: whether the model predicts classes.
            training: whether settings that only matter in training apply: ``block_size``, ``overlong`` and
                ``completion_only``.

        Raises:
            DataError: naming the row that cannot be read.
            ConfigError: if classes are requested of a task that has none.
        """
        data, fields = self.settings, self.fields
        if data.block_size is not None and training:
            return encode_blocks(rows, tokenizer, fields, data.block_size)
        overlong = data.overlong if training else "truncate"
        if classify:
            if self.task is not None and self.num_labels is None:
                raise ConfigError(f"task {self.task.config.name} has no classes to predict; set task=causal_lm")
            return encode_classification(rows, tokenizer, fields, self.max_length, overlong, self.labels)
        form = self.prompt_format
        return encode_rows(
            rows,
            tokenizer,
            replace(fields, template_kwargs=form.template_kwargs),
            self.max_length,
            overlong,
            completion_only=data.completion_only or not training,
            chat_template=self.chat_template,
            answer_prefix=form.answer_prefix if self.form is not None or not training else None,
        )

    def encode_prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedPrompt]:
        """Encode the prompts of rows for generation; raises DataError naming the row that cannot be read."""
        form = self.prompt_format
        fields = replace(self.fields, template_kwargs=form.template_kwargs)
        return encode_prompts(rows, tokenizer, fields, self.max_length, self.chat_template, form.answer_prefix)

    def references(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[EncodedPrompt]) -> list[list[str]]:
        """Return the correct answers of each row: those of its task, else its target."""
        if self.task is None:
            return [[prompt.target] for prompt in prompts]
        return [row["references"] for row in rows]


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with the columns that the settings name under the names of formats; others stay."""
    present = {column: name for name, column in columns.items() if column in row}
    if not present:
        return row
    kept = {name: value for name, value in row.items() if name not in present and name not in present.values()}
    classes = {present.get(column, column): names for column, names in row.classes.items()}
    return row.with_fields({**kept, **{name: row[column] for column, name in present.items()}}, classes)
