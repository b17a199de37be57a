"""The data of a run: the rows of its own files or of its task, and how they become tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import HELD_BACK, DataConfig
from shadowtune.data.blocks import BlockReport, encode_blocks
from shadowtune.data.carving import carve
from shadowtune.data.encoding import EncodedPrompt, EncodingReport, encode_classification, encode_prompts, encode_rows
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.prompts import FieldNames
from shadowtune.data.sources import Row, has_splits, load_rows
from shadowtune.data.tasks import Task, load_task
from shadowtune.errors import ConfigError, DataError

MAX_LENGTH = 512
"""Tokens of a row where neither the settings nor a task say how many."""
TASK_FIELDS = FieldNames(prompt="prompt", completion="completion", text="prompt", label="label")


@dataclass(frozen=True)
class Dataset:
    """Settings, and the task they name."""

    settings: DataConfig
    task: Task | None = None
    form: PromptFormat | None = None
    """What was read off the training rows; None before that, or where nothing was trained."""

    @classmethod
    def open(cls, settings: DataConfig) -> "Dataset":
        """Load the task that the settings name, if they do; raises ConfigError if there is none of that name."""
        return cls(settings, None if settings.task is None else load_task(settings.task))

    def of_task(self, name: str) -> "Dataset":
        """Return another task's data, from the same directory and with the same settings of length and chat template.

        Raises:
            ConfigError: if there is no task of that name.
        """
        data = self.settings
        other = Dataset.open(
            DataConfig(
                task=name, directory=data.directory, max_length=data.max_length, chat_template=data.chat_template
            )
        )
        if self.form is None:
            return other
        return replace(
            other,
            form=replace(
                self.form,
                template=other.template,
                chat_template=other.chat_template,
                optional_fields=(),
                main_field=None,
            ),
        )

    @property
    def task_version(self) -> str | None:
        """Name and version of the task; None if there is none."""
        return None if self.task is None else f"{self.task.config.name} version {self.task.config.version}"

    @property
    def fields(self) -> FieldNames:
        """Where the rows keep their parts."""
        return FieldNames.from_config(self.settings) if self.task is None else TASK_FIELDS

    @property
    def template(self) -> str | None:
        """How a prompt is made from a row's fields; None if it is a field."""
        return self.settings.template if self.task is None else self.task.config.prompt

    @property
    def max_length(self) -> int:
        """Tokens of a row: what the settings say, else the task."""
        return self.settings.max_length or (MAX_LENGTH if self.task is None else self.task.config.max_length)

    @property
    def prompt_format(self) -> PromptFormat:
        """How a user's words become a prompt: as read off the training rows, else as the settings say."""
        if self.form is not None:
            return self.form
        settings = self.settings
        return PromptFormat(self.template, self.chat_template, settings.optional_fields, settings.main_field)

    @property
    def chat_template(self) -> bool:
        """Whether prompts go through the tokenizer's chat template: what the settings say, else the task."""
        if self.settings.chat_template is not None:
            return self.settings.chat_template
        return self.task is None or self.task.config.chat_template

    @property
    def num_labels(self) -> int | None:
        """Classes of the task; None if it has none, or there is no task."""
        labels = None if self.task is None else self.task.config.labels
        return None if labels is None else len(labels)

    @property
    def metric(self) -> str:
        """How answers are scored."""
        return "exact_match" if self.task is None else self.task.config.metric

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer; None allows as many as the longest true one has."""
        return None if self.task is None else self.task.config.max_new_tokens

    def training_rows(self) -> list[Row]:
        """Load the rows to learn from; raises DataError as ``load_rows``."""
        learned = self._training_rows()
        return [*learned, *(self._validation_rows() or [])] if self.settings.learn_validation else learned

    def validation_rows(self) -> list[Row] | None:
        """Load the rows to validate on during training; None if none are asked for, or they are learned."""
        return None if self.settings.learn_validation else self._validation_rows()

    def _training_rows(self) -> list[Row]:
        """Load the training rows alone."""
        settings = self.settings
        if self.task is not None:
            return self.task.rows("train", settings.directory, settings.limit)
        if settings.validation == HELD_BACK:
            return self._part("train")[: settings.limit]
        assert settings.train is not None
        return load_rows(settings.train, settings.train_split, settings.limit)

    def _validation_rows(self) -> list[Row] | None:
        """Load the validation rows; None if none are asked for."""
        settings = self.settings
        if settings.validation is None:
            return None
        if self.task is not None:
            return self.task.rows("validation", settings.directory, settings.validation_limit)
        if settings.validation == HELD_BACK:
            return self._part("validation")[: settings.validation_limit]
        return load_rows(settings.validation, settings.validation_split, settings.validation_limit)

    def held_out(self, split: str, source: str | None = None, limit: int | None = None) -> list[Row]:
        """Load rows that were not trained on.

        Args:
            split: of the data set, or part of the task.
            source: another data set, or "held_back"; for a task, another directory of data sets.
            limit: at most so many: a task's are a random sample, others the first.

        Raises:
            DataError: if the rows cannot be read, or would be those of training.
        """
        if self.task is not None:
            return self.task.rows(split, source or self.settings.directory, limit)
        if source == HELD_BACK:
            return self._part("validation")[:limit]
        if source is None:
            source = self.settings.train
            assert source is not None
            if not has_splits(source):
                raise DataError(f"{source} holds the rows that the run was trained on; pass --data with held-out rows")
        return load_rows(source, split, limit)

    def _part(self, part: str) -> list[Row]:
        """Load the training rows without a tenth of them, or ("validation") this tenth."""
        settings = self.settings
        assert settings.train is not None
        rows = carve(load_rows(settings.train, settings.train_split, None), ["validation"])[part]
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
        """Encode rows with their answers or, for a model that classifies, their classes.

        Args:
            rows: as the methods above give them.
            tokenizer: of the model.
            classify: whether the model predicts classes.
            training: whether settings that only matter in training hold: blocks, what happens to longer rows, and
                whether prompts are learned.

        Raises:
            DataError: naming the row that cannot be read.
            ConfigError: if the task has no classes and they are asked for.
        """
        data, fields = self.settings, self.fields
        if data.block_size is not None and training:
            return encode_blocks(rows, tokenizer, fields, data.block_size)
        overlong = data.overlong if training else "truncate"
        if classify:
            if self.task is not None and self.num_labels is None:
                raise ConfigError(f"task {self.task.config.name} has no classes to predict; set task=causal_lm")
            return encode_classification(rows, tokenizer, fields, self.max_length, overlong)
        only = data.completion_only or not training
        prefix = self.prompt_format.answer_prefix if self.form is not None or not training else None
        given = self.prompt_format.template_kwargs
        return encode_rows(rows, tokenizer, fields, self.max_length, overlong, only, self.chat_template, prefix, given)

    def encode_prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedPrompt]:
        """Encode the prompts of rows, for generation; raises DataError naming the row that cannot be read."""
        form = self.prompt_format
        shape = (self.fields, self.max_length, self.chat_template)
        return encode_prompts(rows, tokenizer, *shape, form.answer_prefix, form.template_kwargs)

    def references(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[EncodedPrompt]) -> list[list[str]]:
        """Return for each row all answers that count as right: its task's, else the one that is its target."""
        if self.task is None:
            return [[prompt.target] for prompt in prompts]
        return [row["references"] for row in rows]
