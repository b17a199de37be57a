"""Sample answers: what the models of a run answer to a few validation examples, at each evaluation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.generation import generate_answers
from shadowtune.data.labels import MULTI, REGRESSION, Labels
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.training.callbacks import drop_later_lines
from shadowtune.training.training_data import TrainingData

Label = int | float | list[float]
"""A class, the number of a regression, or a 0 or 1 for each of several classes."""
MAX_TOKENS = 64
"""Longest sample answer."""
PROMPT_OF_TEXT = 16
"""Tokens of a plain text, which has no prompt, that the models continue."""
SHOWN = 60
"""Characters of a prompt or an answer in a line for the user; samples.jsonl has all."""


@dataclass(frozen=True)
class Sample:
    """A validation example whose prompt is answered."""

    prompt_ids: list[int]
    prompt: str
    expected: str
    max_new_tokens: int


class SampleAnswers(TrainerCallback):
    """Answers a few validation examples after each evaluation: reports the answers and appends them to a file.

    A line of the file has "step", "prompt", "expected", and the answers: "attached" and "detached" of a shadow (in its
    shadow-only stage "detached" alone), "model" of other methods. A classifier's are its classes. Answers are greedy,
    so the random state is as before.

    Args:
        file: for example ``RUN/samples.jsonl``.
        model: as it is trained, not wrapped for several processes.
        data: of the run.
        count: number of examples, spread evenly over the validation examples.
        modes: "attached" and "detached", or one of them; ("model",) of a model without modes.
        report: called with a line for each sample.
    """

    def __init__(
        self,
        file: Path,
        model: Any,
        data: TrainingData,
        count: int,
        modes: Sequence[str],
        report: Callable[[str], None],
    ) -> None:
        rows = data.validation or []
        count = min(count, len(rows))
        self.rows = [rows[index * len(rows) // count] for index in range(count)]
        self.file, self.model, self.data, self.modes, self.report = file, model, data, modes, report
        if data.num_labels is None:
            self.samples = [_text_sample(row, data.tokenizer) for row in self.rows]
        else:
            self.samples = [_class_sample(row, data.tokenizer, data.labels or Labels()) for row in self.rows]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the step that training resumes from."""
        if state.is_world_process_zero:
            drop_later_lines(self.file, state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the samples in each mode, in the first process."""
        if not state.is_world_process_zero or not self.samples:
            return
        answers = {mode: self._answers(mode) for mode in self.modes}
        lines = []
        for index, sample in enumerate(self.samples):
            given = {mode: texts[index] for mode, texts in answers.items()}
            lines.append({"step": state.global_step, "prompt": sample.prompt, "expected": sample.expected, **given})
            shown = ", ".join(f"{mode}: {_short(text)}" for mode, text in given.items())
            self.report(f"sample {_short(sample.prompt)} -> {shown} (expected: {_short(sample.expected)})")
        with self.file.open("a") as handle:
            handle.write("".join(json.dumps(line) + "\n" for line in lines))

    def _answers(self, mode: str) -> list[str]:
        if not isinstance(self.model, ShadowPreTrainedModel):
            return self._greedy()
        before = self.model.mode
        try:
            self.model.set_mode(mode)  # type: ignore[arg-type]
            return self._greedy()
        finally:
            self.model.set_mode(before)

    @torch.inference_mode()
    def _greedy(self) -> list[str]:
        self.model.eval()  # the next training step puts it back
        if self.data.num_labels is not None:
            batch = {name: tensor.to(self.model.device) for name, tensor in self.data.collate(self.rows).items()}
            batch.pop("labels")
            labels = self.data.labels or Labels()
            return [_label_text(labels, _predicted(labels, row)) for row in self.model(**batch).logits.tolist()]
        texts, _ = generate_answers(
            self.model,
            self.data.tokenizer,
            [sample.prompt_ids for sample in self.samples],
            max(sample.max_new_tokens for sample in self.samples),
            form=self.data.prompt_format,
        )
        return texts


def _text_sample(row: dict[str, Any], tokenizer: Any) -> Sample:
    """The prompt and first answer of an encoded example; of a plain text, its beginning and what follows."""
    ids, labels = row["input_ids"], row["labels"]
    begin = next((index for index, label in enumerate(labels) if index and label != IGNORE_INDEX), len(ids))
    if begin == 1:
        begin = max(1, min(PROMPT_OF_TEXT, len(ids) // 2))
    end = next((index for index in range(begin, len(ids)) if labels[index] == IGNORE_INDEX), len(ids))
    prompt, expected = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:begin], ids[begin:end]))
    return Sample(list(ids[:begin]), prompt.strip(), expected.strip(), min(MAX_TOKENS, end - begin + 8))


def _class_sample(row: dict[str, Any], tokenizer: Any, labels: Labels) -> Sample:
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    return Sample(list(row["input_ids"]), text.strip(), _label_text(labels, row["labels"]), 0)


def _predicted(labels: Labels, logits: list[float]) -> Label:
    """The label that a classifier's logits of one example mean, encoded as labels of examples are."""
    if labels.problem_type == REGRESSION:
        return logits[0]
    if labels.problem_type == MULTI:
        return [float(logit > 0) for logit in logits]
    return max(range(len(logits)), key=logits.__getitem__)


def _label_text(labels: Labels, label: Label) -> str:
    """The names of an encoded label's classes, or the number of a regression."""
    if isinstance(label, list):
        return ", ".join(labels.name(number) for number, value in enumerate(label) if value)
    return f"{label:g}" if isinstance(label, float) else labels.name(label)


def _short(text: str) -> str:
    """One line in quotation marks: of a long text its end."""
    line = " ".join(text.split())
    return json.dumps(line if len(line) <= SHOWN else "... " + line[-SHOWN:], ensure_ascii=False)
