"""A trained model, whatever files it was loaded from: its modes, its tokenizer, evaluation on held-out examples."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.config.data import DataConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.collate import ClassificationCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.labels import Labels
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, DataError
from shadowtune.evaluation.evaluate import (
    Evaluation,
    EvaluationOptions,
    evaluate_classes,
    evaluate_exported,
    evaluate_generation,
)
from shadowtune.export.loading import LoadedModel, wrap_model
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.ensemble import LogitEnsemble
from shadowtune.model.methods import Task
from shadowtune.model.modeling import ShadowPreTrainedModel


@dataclass(frozen=True)
class ModelSource:
    """Origin of a model, and what it can do."""

    name: str
    """Path or Hub id, as the user gave it."""
    kind: str
    """Kind of its files, with an article, for messages: "a lora run", "a GGUF file"."""
    task: Task
    modes: tuple[str, ...]
    """Of "attached", "detached" and "base", those that it has; the first is the default."""


class TrainedModel(ABC):
    """A model of torch, or an exported one (``LoadedModel``), with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    @abstractmethod
    def source(self) -> ModelSource:
        """Origin of the model."""

    @property
    @abstractmethod
    def prompt_format(self) -> PromptFormat:
        """Prompt format and end of answers, as in training."""

    @abstractmethod
    def examples(self, source: str | None, task: str | None) -> Dataset:
        """Return the data set to evaluate on.

        Args:
            source: a data set as in ``DataConfig.train``; with a task, a directory of data sets. None takes the
                model's own.
            task: another task than that of training, as in ``DataConfig.task``.

        Raises:
            DataError: if there is none.
        """

    @property
    def own_data(self) -> Dataset | None:
        """The data that it was trained on; None if its files do not say."""
        return None

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of this model."""
        return self.source.modes

    @property
    def drafts(self) -> bool:
        """Whether it has a shadow that drafts for its attached model."""
        return isinstance(self.model, ShadowForCausalLM)

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Yield the model in one mode, for the length of the context.

        Raises:
            ConfigError: if it has no such mode.
        """
        self.check_mode(mode)
        if isinstance(self.model, ShadowPreTrainedModel):
            before = self.model.mode
            try:
                yield self.model.set_mode(mode)  # type: ignore[arg-type]
            finally:
                self.model.set_mode(before)
        elif mode == "base" and len(self.modes) > 1:
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model

    @contextmanager
    def loaded(self, mode: str) -> Iterator[LoadedModel]:
        """Yield one mode as a model that decodes token by token; no weight may change meanwhile.

        Raises:
            ConfigError: if it has no such mode, or does not decode token by token.
        """
        self.check_generates()
        with self.mode(mode) as model:
            if isinstance(model, LoadedModel):
                yield model
                return
            if isinstance(model, LogitEnsemble):
                raise ConfigError(f"{self.source.name} is {self.source.kind}, which only generate and evaluate run")
            plain = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # with PEFT's layers in it
            with prepacked_linear(plain):
                yield wrap_model(plain, self.tokenizer, self.prompt_format)

    def check_mode(self, mode: str) -> None:
        """Raise ConfigError if it has no such mode."""
        if mode not in self.modes:
            raise ConfigError(
                f"{self.source.name} is {self.source.kind} and has no mode {mode!r}; it has {', '.join(self.modes)}"
            )

    def check_generates(self) -> None:
        """Raise ConfigError if it is a classifier."""
        if self.source.task == "classification":
            raise ConfigError(
                f"{self.source.name} is {self.source.kind}: it predicts classes and generates no text; use "
                f"shadowtune predict {self.source.name} FILE, or shadowtune evaluate {self.source.name}"
            )

    def prompt(self, text: str | None, fields: Mapping[str, Any] | None = None) -> str:
        """Fill the template of training with a user's text, and fields by name."""
        return self.prompt_format.fill(text, fields)

    def evaluate(
        self,
        mode: str,
        source: str | None = None,
        split: str = "test",
        limit: int | None = None,
        task: str | None = None,
        **options: Any,
    ) -> Evaluation:
        """Evaluate one mode on held-out examples, by default the "test" split of the run's data set or task.

        Args:
            mode: one of ``modes``.
            source: as for ``examples``.
            split: of a data set that has splits, or part of the task: "train", "validation" or "test".
            limit: number of examples: the first ones; of a task, a random sample that is always the same.
            task: as for ``examples``.
            options: fields of ``EvaluationOptions``; drafts are used in mode "attached" only.

        Raises:
            DataError: if the examples cannot be read, would be the training examples, or have classes that the model
                lacks.
            ConfigError: if the task is unknown, or has no classes and the model predicts classes.
        """
        chosen = EvaluationOptions(**options)
        data = self.examples(source, task)
        rows = data.held_out(split, source, limit)
        pad = self.tokenizer.pad_token_id
        with self.mode(mode) as model:
            if self.source.task == "classification":
                known = replace(data, labels=Labels.of_model(model.config))
                encoded = known.encode(rows, self.tokenizer, classify=True)[0]
                with prepacked_linear(model):  # no weight changes meanwhile
                    result = evaluate_classes(model, encoded, ClassificationCollator(pad), chosen)
                return replace(result, task=data.task_version)
            prompts = data.encode_prompts(rows, self.tokenizer)
            ids, references = [prompt.input_ids for prompt in prompts], data.references(rows, prompts)
            answers = data.encode(rows, self.tokenizer, classify=False)[0]
            chosen = replace(
                chosen,
                max_new_tokens=chosen.max_new_tokens or data.max_new_tokens,
                speculate=chosen.speculate if mode == "attached" else None,
            )
            if isinstance(model, LoadedModel):
                result = evaluate_exported(model, ids, references, answers, data.metric, chosen)
            else:
                given = (ids, references, answers, data.metric, self.prompt_format, chosen)
                with prepacked_linear(model):
                    result = evaluate_generation(model, self.tokenizer, *given)
        return replace(result, task=data.task_version)


@dataclass
class SavedModel(TrainedModel):
    """A model that was loaded from its files alone, without the run that trained it."""

    origin: ModelSource
    model: Any
    tokenizer: PreTrainedTokenizerBase
    form: PromptFormat

    @property
    def source(self) -> ModelSource:
        """Origin of the model."""
        return self.origin

    @property
    def prompt_format(self) -> PromptFormat:
        """The format saved beside the model; without one, the tokenizer's chat template."""
        return self.form

    def examples(self, source: str | None, task: str | None) -> Dataset:
        """Return a data set in the model's prompt format; raises DataError without ``source`` and ``task``."""
        if source is None and task is None:
            raise DataError(
                f"{self.origin.name} is {self.origin.kind} and has no examples of its own; pass --data FILE with "
                "held-out ones, or --task NAME"
            )
        data = data_of_format(self.form, source or "")
        return data if task is None else data.of_task(task)


def data_of_format(prompt_format: PromptFormat, source: str) -> Dataset:
    """Return a file of prompts and completions, or of the fields in a prompt format, as a run's data set."""
    settings = DataConfig(
        train=source,
        template=prompt_format.template,
        chat_template=prompt_format.chat_template,
        optional_fields=prompt_format.optional_fields,
        main_field=None if prompt_format.template is None else prompt_format.main_field,
    )
    return replace(Dataset.open(settings), form=prompt_format)
