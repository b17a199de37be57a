"""The data of a run: rows of its own files or of its task, and how they are encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import HOLD_OUT, DataConfig
from shadowtune.data.blocks import BlockReport, encode_blocks
from shadowtune.data.encoding import EncodedPrompt, EncodingReport, encode_classification, encode_prompts, encode_rows
from shadowtune.data.examples import FieldNames
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.sources import Row, has_splits, load_rows, split_rows
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
        return FieldNames.from_config(self.settings) if self.task is None else TASK_FIELDS

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
        elif settings.validation == HOLD_OUT:
            rows = self._part("train")[: settings.limit]
        else:
            assert settings.train is not None
            rows = load_rows(settings.train, settings.train_split, settings.limit)
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
        if settings.validation == HOLD_OUT:
            return self._part("validation")[: settings.validation_limit]
        return load_rows(settings.validation, settings.validation_split, settings.validation_limit)

    def held_out(self, split: str, source: str | None = None, limit: int | None = None) -> list[Row]:
        """Load rows that were not trained on.

        Args:
            split: of the data set, or part of the task.
            source: another data set, or "held_back"; for a task, another directory of data sets.
            limit: maximum number of rows: of a task a random sample, otherwise the first.

        Raises:
            DataError: if the rows cannot be read, or are those of training.
        """
        if self.task is not None:
            return self.task.rows(split, source or self.settings.directory, limit)
        if source == HOLD_OUT:
            return self._part("validation")[:limit]
        if source is None:
            source = self.settings.train
            assert source is not None
            if not has_splits(source):
                raise DataError(f"{source} holds the rows that the run was trained on; pass --data with held-out rows")
        return load_rows(source, split, limit)

    def _part(self, part: str) -> list[Row]:
        """Split the training rows and return "train" or the hold-out, "validation"."""
        settings = self.settings
        assert settings.train is not None
        rows = split_rows(load_rows(settings.train, settings.train_split, None), ["validation"])[part]
        if not rows:
            raise DataError(f"{settings.train} has too few rows to hold some back for validation; add rows")
        return rows

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
            return encode_classification(rows, tokenizer, fields, self.max_length, overlong)
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
