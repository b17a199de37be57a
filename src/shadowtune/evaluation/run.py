"""A finished training run: a trained model with its settings and its data."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import DataConfig
from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.data.chat_template import has_prompt_format, load_tokenizer_and_format
from shadowtune.data.collate import CausalCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError
from shadowtune.evaluation.evaluate import answer_loss
from shadowtune.evaluation.trained_model import ModelSource, TrainedModel
from shadowtune.model.methods import load_trained
from shadowtune.model.quantization import Quantization, quantization_arguments

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
class FinishedRun(TrainedModel):
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
    def source(self) -> ModelSource:
        """Origin of the model: the run directory, with the modes of the run's method."""
        config = self.config
        kind = "a classification run" if config.task == "classification" else f"a {config.method} run"
        modes = MODES["shadow" if config.leaves_shadow else config.method]
        return ModelSource(str(self.path), kind, config.task, modes)

    @property
    def prompt_format(self) -> PromptFormat:
        """Prompt format and end of answers, as in training."""
        return self.dataset.prompt_format

    @property
    def own_data(self) -> Dataset:
        """The data of the run."""
        return self.dataset

    def examples(self, source: str | None, task: str | None) -> Dataset:
        """Return the data of the run, or of another task."""
        return self.dataset if task is None else self.dataset.of_task(task)

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
