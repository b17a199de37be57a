"""Predictions for rows without answers: classes or numbers of a classifier, generated answers of a language model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shadowtune.data.collate import ClassificationCollator
from shadowtune.data.examples import (
    Completion,
    Conversation,
    Example,
    FieldNames,
    PlainText,
    fill_template,
    read_messages,
    require_field,
    text_field,
)
from shadowtune.data.files import named_columns
from shadowtune.data.formats import read_example, recognize
from shadowtune.data.generation import Progress, generate_answers
from shadowtune.data.sources import row_location
from shadowtune.errors import DataError
from shadowtune.evaluation.generation import GenerationOptions, stream_answer
from shadowtune.evaluation.trained_model import TrainedModel
from shadowtune.export.loading import LoadedModel
from shadowtune.model.methods import context_length

MAX_LENGTH = 512
"""Tokens of a text to classify, unless the run set another limit; longer texts are cut at their end, as in training."""


@dataclass(frozen=True)
class Prediction:
    """A prediction for one row."""

    value: str | int | float | list[str | int]
    """An answer, a class by its name (its number, if it has none), several classes, or a number of regression."""
    probability: float | None = None
    """Of the class, by the model."""


def usual_column(trained: TrainedModel) -> str | None:
    """Return the column that a single text fills: the template's main field, or one that the run's settings name."""
    form, data = trained.prompt_format, trained.own_data
    if form.template is not None or data is None:
        return form.text_field
    fields, columns = data.fields, data.settings.columns
    text = fields.text or columns.get("text")
    return text if trained.source.task == "classification" else fields.prompt or columns.get("prompt") or text


class Predictor:
    """Predicts rows with one mode of a model.

    Args:
        trained: the model.
        model: what ``trained.mode`` yields.
        column: of the text or prompt; None reads rows as in training, in any format without its answer.
        max_new_tokens: of an answer.
        batch_size: rows at a time.
    """

    def __init__(
        self,
        trained: TrainedModel,
        model: Any,
        column: str | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> None:
        self.trained, self.model, self.column = trained, model, column
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._data = trained.own_data

    def predict(
        self, rows: Sequence[Mapping[str, Any]], progress: Progress = lambda done, total: None
    ) -> list[Prediction]:
        """Predict rows, in their order.

        Raises:
            DataError: naming the row that has no text, or is too long for the model.
        """
        located = [(row, row_location(row, index)) for index, row in enumerate(rows)]
        if self.trained.source.task == "classification":
            return self._classify([self._text_ids(row, where) for row, where in located], progress)
        prompts = [self._prompt_ids(row, where) for row, where in located]
        return [Prediction(answer) for answer in self._answers(prompts, progress)]

    def _text_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Return the token ids of a text to classify."""
        form = self.trained.prompt_format
        if form.template is not None and self.column is None:
            text = fill_template(form.template, row, where, form.optional_fields)
        else:
            text = text_field(self._renamed(row), self.column or usual_column(self.trained) or "text", where)
        limit = MAX_LENGTH if self._data is None else self._data.max_length
        ids: list[int] = self.trained.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        if not ids:
            raise DataError(f"{where}: the text is empty")
        return ids

    def _prompt_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Return the token ids of a row's prompt, as in training."""
        form, tokenizer, example = self.trained.prompt_format, self.trained.tokenizer, self._example(row, where)
        if isinstance(example, Conversation):
            messages = example.messages
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            ids = form.encode(asked, tokenizer, example.tools, example.template_kwargs)
        else:
            text = example.text if isinstance(example, PlainText) else example.prompt
            if not text.strip():
                raise DataError(f"{where}: the prompt is empty")
            extra = None
            if isinstance(example, Completion):
                extra = Conversation([], tools=example.tools, template_kwargs=example.template_kwargs)
            ids = form.wrap(text, tokenizer, extra)
        model = self.model
        positions = model.max_length if isinstance(model, LoadedModel) else context_length(model)
        if positions is not None and len(ids) + self.max_new_tokens > positions:
            raise DataError(
                f"{where}: prompt ({len(ids)} tokens) and answer ({self.max_new_tokens}) exceed the model's "
                f"{positions} positions; shorten it, or lower --max-new-tokens"
            )
        return ids

    def _example(self, row: Mapping[str, Any], where: str) -> Example:
        """Read a row as training does, with a placeholder for the answer that it may lack."""
        if self.column is not None:
            value = require_field(row, self.column, where)
            if isinstance(value, list):
                return Conversation(read_messages(value, self.column, where))
            return PlainText(text_field(row, self.column, where))
        form, data = self.trained.prompt_format, self._data
        fields = FieldNames(template=form.template, optional=form.optional_fields)
        if data is not None and data.task is None:
            fields = data.fields
        fields = replace(fields, template_kwargs=form.template_kwargs)
        given, answer = self._renamed(row), "-"
        turns = [{"role": "assistant", "content": answer}]
        asked = given.get(fields.prompt or "prompt")
        answers = {fields.completion or "completion": turns if isinstance(asked, list) else answer}
        completed = {**given, "output": answer, fields.label or "label": answer, **answers}
        if recognize(completed, fields) is None:
            raise DataError(
                f"{where}: no format fits the columns {named_columns(row)}; name the prompt's with --column"
            )
        return read_example(completed, fields, where)

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with the columns that the run's settings name (``data.columns``) under their usual names."""
        columns = {} if self._data is None else self._data.settings.columns
        return {**row, **{name: row[column] for name, column in columns.items() if column in row}}

    def _answers(self, prompts: list[list[int]], progress: Progress) -> list[str]:
        form, model = self.trained.prompt_format, self.model
        if not isinstance(model, LoadedModel):
            size = (self.max_new_tokens, self.batch_size)
            return generate_answers(model, self.trained.tokenizer, prompts, *size, progress, form=form)[0]
        answers, options = [], GenerationOptions(self.max_new_tokens)
        for ids in prompts:
            answer = stream_answer(model, ids, options).answer
            answers.append((answer.rpartition(form.content_mark)[2] if form.content_mark else answer).strip())
            progress(len(answers), len(prompts))
        return answers

    @torch.inference_mode()
    def _classify(self, inputs: list[list[int]], progress: Progress) -> list[Prediction]:
        model, pad = self.model.eval(), self.trained.tokenizer.pad_token_id
        task = None if self._data is None else self._data.task
        read = _reader(model.config, None if task is None else task.config.labels)
        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
        made: dict[int, Prediction] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = ClassificationCollator(pad)([{"input_ids": inputs[index], "labels": 0} for index in chosen])
            given = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
            logits = model(**given).logits.float().cpu()
            made.update(zip(chosen, map(read, logits), strict=True))
            progress(start + len(chosen), len(order))
        return [made[index] for index in range(len(inputs))]


def _reader(config: Any, names: Sequence[str] | None) -> Callable[[torch.Tensor], Prediction]:
    """Return the function from logits (C,) to a prediction, by the problem type in a classifier's config."""

    def name(index: int) -> str | int:
        given = names[index] if names is not None else config.id2label.get(index, "")
        return given if given and given != f"LABEL_{index}" else index

    def several(logits: torch.Tensor) -> Prediction:
        return Prediction([name(index) for index, logit in enumerate(logits.tolist()) if logit > 0])

    def number(logits: torch.Tensor) -> Prediction:
        return Prediction(float(logits[0]))

    def one(logits: torch.Tensor) -> Prediction:
        index = int(logits.argmax())
        return Prediction(name(index), float(logits.softmax(-1)[index]))

    return {"multi_label_classification": several, "regression": number}.get(config.problem_type, one)
