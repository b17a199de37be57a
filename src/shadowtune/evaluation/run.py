"""A finished training run: its model in any mode, its tokenizer, and evaluation on held-out examples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import DataConfig
from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.chat_template import has_prompt_format, load_tokenizer_and_format
from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.labels import Labels
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.evaluation.evaluate import (
    Evaluation,
    EvaluationOptions,
    answer_loss,
    evaluate_classes,
    evaluate_generation,
)
from shadowtune.model.methods import Quantization, load_trained, quantization_arguments

MODES = {
    "shadow": ("attached", "detached", "base"),
    "lora": ("attached", "base"),
    "dora": ("attached", "base"),
    "full": ("attached",),
    "peft": ("attached", "base"),
    "ensemble": ("attached", "base"),
}
"""Modes of each method's model; LoRA and the like are "attached". PEFT's Shadow tuner has those of a shadow."""


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
            check_base_weights: whether to refuse a base whose weights differ from those in training.
            quantization: of the base; by default that of training.

        Raises:
            CheckpointError: if the directory is no run, or the run is not finished.
        """
        path = Path(path)
        config = read_run_config(path)
        dtype = vars(torch)[config.base_dtype]
        quantized = quantization_arguments(quantization or config.base_quantization, dtype)
        model = load_trained(
            path / "model", config.method, config.task, config.model, check_base_weights, dtype=dtype, **quantized
        )
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return cls(path, config, model, load_tokenizer_and_format(str(path / "model"))[0])

    @cached_property
    def dataset(self) -> Dataset:
        """The data of the run, with the prompt format that training recorded."""
        return run_dataset(self.path, self.config)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of this run's method."""
        return MODES["shadow" if self.config.leaves_shadow else self.config.method]

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Yield the model in one mode, for the length of the context.

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
        """Prompt format and end of answers, as in training."""
        return self.dataset.prompt_format

    def prompt(self, text: str | None, fields: Mapping[str, Any] | None = None) -> str:
        """Fill the run's template with a user's text, and fields by name."""
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
            source: a data set as in ``DataConfig.train``; with a task, a directory of data sets.
            split: of a data set that has splits, or part of the task: "train", "validation" or "test".
            limit: number of examples: the first ones; of a task, a random sample that is always the same.
            task: another task than that of training, as in ``DataConfig.task``.
            options: fields of ``EvaluationOptions``; drafts are used in mode "attached" only.

        Raises:
            DataError: if the examples cannot be read, would be the training examples, or have classes that the model
                lacks.
            ConfigError: if the task is unknown, or has no classes and the model predicts classes.
        """
        chosen = EvaluationOptions(**options)
        data = self.dataset if task is None else self.dataset.of_task(task)
        rows = data.held_out(split, source, limit)
        pad = self.tokenizer.pad_token_id
        with self.mode(mode) as model, prepacked_linear(model):  # no weight changes meanwhile
            if self.config.task == "classification":
                known = replace(data, labels=Labels.of_model(model.config))
                encoded = known.encode(rows, self.tokenizer, classify=True)[0]
                result = evaluate_classes(model, encoded, ClassificationCollator(pad), chosen)
            else:
                prompts = data.encode_prompts(rows, self.tokenizer)
                result = evaluate_generation(
                    model,
                    self.tokenizer,
                    [prompt.input_ids for prompt in prompts],
                    data.references(rows, prompts),
                    data.encode(rows, self.tokenizer, classify=False)[0],
                    data.metric,
                    self.prompt_format,
                    replace(
                        chosen,
                        max_new_tokens=chosen.max_new_tokens or data.max_new_tokens,
                        speculate=chosen.speculate if mode == "attached" else None,
                    ),
                )
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


def run_dataset(path: Path, config: TrainConfig) -> Dataset:
    """Return the data of a run, with the prompt format that was recorded with its model, if there is one."""
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
