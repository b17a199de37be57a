"""A finished training run, opened for use: its model in any mode, its tokenizer, its held-out rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import DataConfig
from shadowtune.config.loading import load_config
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.config.training import TrainConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.chat_template import has_prompt_format, load_tokenizer_and_format
from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.sources import Row
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.evaluation.runner import Evaluation, Progress, answer_loss, evaluate_classes, evaluate_generation
from shadowtune.model.methods import Quantization, load_trained, quantization_arguments

MODES = {
    "shadow": ("attached", "detached", "base"),
    "lora": ("attached", "base"),
    "dora": ("attached", "base"),
    "full": ("attached",),
    "peft": ("attached", "base"),
    "ensemble": ("attached", "base"),
}
"""What each method's model can compute; adapters are "attached". What PEFT's Shadow tuner leaves is a shadow."""


@dataclass
class FinishedRun:
    """A run directory with its model loaded."""

    path: Path
    config: TrainConfig
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(
        cls, path: str | Path, check_base_weights: bool = True, quantization: Quantization | None = None
    ) -> "FinishedRun":
        """Load a run.

        Args:
            path: the run directory.
            check_base_weights: whether a base with other weights than in training is refused.
            quantization: of the base; by default as in training.

        Raises:
            CheckpointError: if the directory is no run, or has not finished.
        """
        path = Path(path)
        config = read_run_config(path)
        dtype = vars(torch)[config.base_dtype]
        quantized = quantization_arguments(quantization or config.base_quantization, dtype)
        model = load_trained(
            path / "model", config.method, config.task, config.model, check_base_weights, dtype=dtype, **quantized
        )
        if torch.cuda.is_available():
            model.to("cuda")
        return cls(path, config, model, load_tokenizer_and_format(str(path / "model"))[0])

    @cached_property
    def dataset(self) -> Dataset:
        """The data that the run was trained on, with what was read off its rows."""
        return run_dataset(self.path, self.config)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of this run's method."""
        return MODES["shadow" if self.config.leaves_shadow else self.config.method]

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Give the model in one mode, for the length of the context.

        Raises:
            ConfigError: if the run's method has no such mode.
        """
        if mode not in self.modes:
            raise ConfigError(f"a {self.config.method} run has no mode {mode!r}; it has {', '.join(self.modes)}")
        if self.config.leaves_shadow:
            before = self.model.mode
            try:
                yield self.model.set_mode(mode)
            finally:
                self.model.set_mode(before)
        elif mode == "base":
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model

    @property
    def prompt_format(self) -> PromptFormat:
        """How a user's words become a prompt and where an answer ends, as in training."""
        return self.dataset.prompt_format

    def prompt(self, text: str | None, fields: Mapping[str, Any] | None = None) -> str:
        """Put a user's words, and fields by name, where the run's template had a row's."""
        return self.prompt_format.fill(text, fields)

    def evaluate(
        self,
        mode: str,
        source: str | None = None,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        progress: Progress = lambda done, total: None,
        task: str | None = None,
        said: Sequence[Sequence[int]] | None = None,
        speculate: SpeculationConfig | None = None,
    ) -> Evaluation:
        """Evaluate one mode on held-out rows, by default the "test" split of the run's data set or task.

        Args:
            mode: one of ``modes``.
            source: a data set as in ``DataConfig.train``; with a task, a directory of data sets.
            split: of a data set that has splits, or part of the task: "train", "validation" or "test".
            limit: use only so many rows: the first ones; of a task, a random sample that is always the same.
            batch_size: rows at a time; padded on the left, with a cache.
            max_new_tokens: by default what the task says, else enough for the longest true answer.
            progress: called with the rows finished and their total.
            task: another task than that of training, as in ``DataConfig.task``.
            said: ``Evaluation.answers`` of another mode on the same rows, to say how much this one agrees.
            speculate: in mode "attached", how the shadow drafts ahead; None for token by token.

        Raises:
            DataError: if the rows cannot be read, would be the training rows, or have classes that the model lacks.
            ConfigError: if the task is unknown, or has no classes and the model predicts classes.
        """
        data = self.dataset if task is None else self.dataset.of_task(task)
        rows = data.held_out(split, source, limit)
        with self.mode(mode) as model, prepacked_linear(model):  # nothing trains meanwhile
            if self.config.task == "classification":
                result = self._classify(model, data, rows, batch_size, progress, said)
            else:
                new_tokens = max_new_tokens or data.max_new_tokens
                drafting = speculate if mode == "attached" else None
                result = self._generate(model, data, rows, batch_size, new_tokens, progress, said, drafting)
        return replace(result, task=data.task_version)

    def text_loss(
        self, mode: str, data: DataConfig, limit: int | None = None, batch_size: int = 32
    ) -> tuple[float, int]:
        """Measure one mode of a causal language model on plain text.

        Args:
            mode: one of ``modes``.
            data: the text, with ``block_size``.
            limit: use only so many blocks, the first ones.
            batch_size: blocks at a time.

        Returns:
            The mean cross-entropy per token, whose exponential is the perplexity, and the tokens that were predicted.

        Raises:
            DataError: if the text cannot be read.
            ConfigError: if the run's method has no such mode.
        """
        text = Dataset.open(data)
        blocks = text.encode(text.training_rows(), self.tokenizer, classify=False, training=True)[0][:limit]
        with self.mode(mode) as model:
            loss = answer_loss(model, blocks, CausalCollator(self.tokenizer.pad_token_id), batch_size)
        return loss, sum(len(block["input_ids"]) - 1 for block in blocks)

    def _classify(
        self,
        model: Any,
        data: Dataset,
        rows: Sequence[Row],
        batch_size: int,
        progress: Progress,
        said: Sequence[Sequence[int]] | None,
    ) -> Evaluation:
        encoded = data.encode(rows, self.tokenizer, classify=True)[0]
        collate = ClassificationCollator(self.tokenizer.pad_token_id)
        return evaluate_classes(model, encoded, collate, batch_size, progress, said)

    def _generate(
        self,
        model: Any,
        data: Dataset,
        rows: Sequence[Row],
        batch_size: int,
        max_new_tokens: int | None,
        progress: Progress,
        said: Sequence[Sequence[int]] | None,
        speculate: SpeculationConfig | None,
    ) -> Evaluation:
        prompts = data.encode_prompts(rows, self.tokenizer)
        return evaluate_generation(
            model,
            self.tokenizer,
            [prompt.input_ids for prompt in prompts],
            data.references(rows, prompts),
            data.encode(rows, self.tokenizer, classify=False)[0],
            CausalCollator(self.tokenizer.pad_token_id),
            max_new_tokens,
            batch_size,
            progress,
            data.metric,
            said,
            speculate,
            self.prompt_format.ends,
            self.prompt_format.content_mark,
        )


def run_dataset(path: Path, config: TrainConfig) -> Dataset:
    """Return the data of a run, with what was read off its training rows and recorded with the model, if it was."""
    data, model = Dataset.open(config.data), path / "model"
    if not has_prompt_format(model):
        return data
    asked = data.prompt_format
    recorded = replace(
        PromptFormat.load(model),
        template=asked.template,
        chat_template=asked.chat_template,
        optional_fields=asked.optional_fields,
        main_field=asked.main_field,
    )
    return replace(data, form=recorded)


def read_run_config(path: Path) -> TrainConfig:
    """Read the resolved settings of a run directory; raises CheckpointError if there is none."""
    file = path / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a run directory: it has no config.yaml")
    return replace(load_config(TrainConfig, file, []), output=str(path))
