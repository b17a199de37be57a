"""A finished training run, opened for use: its model in any mode, its tokenizer, its held-out rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shadowtune.config.loading import load_config
from shadowtune.config.templates import parse_template
from shadowtune.config.training import TrainConfig
from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.data.encoding import encode_classification, encode_prompts, encode_rows
from shadowtune.data.prompts import FieldNames
from shadowtune.data.sources import has_splits, load_rows
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.evaluation.runner import Evaluation, Progress, evaluate_classes, evaluate_generation
from shadowtune.model.methods import load_trained
from shadowtune.model.quantization import Quantization, quantization_arguments

MODES = {
    "shadow": ("attached", "detached", "base"),
    "lora": ("attached", "base"),
    "dora": ("attached", "base"),
    "full": ("attached",),
}
"""What each method's model can compute. For lora and dora, "attached" means with the adapters."""


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
        return cls(path, config, model, AutoTokenizer.from_pretrained(str(path / "model")))

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of this run's method."""
        return MODES[self.config.method]

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Give the model in one mode, for the length of the context.

        Raises:
            ConfigError: if the run's method has no such mode.
        """
        if mode not in self.modes:
            raise ConfigError(f"a {self.config.method} run has no mode {mode!r}; it has {', '.join(self.modes)}")
        if self.config.method == "shadow":
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

    def prompt(self, text: str) -> str:
        """Put a user's words where the run's template, if it has one with a single field, had a row's."""
        pieces = [] if self.config.data.template is None else parse_template(self.config.data.template)
        fields = [name for _, name in pieces if name is not None]
        if not fields:
            return text
        if len(fields) > 1:
            raise DataError(
                f"the run's template has the fields {', '.join(fields)}; write the whole prompt and pass --raw"
            )
        return "".join(literal + ("" if name is None else text) for literal, name in pieces)

    def _held_out(self) -> str:
        """Name the data set to evaluate on if none is given: that of training, if it has more than one split."""
        if has_splits(self.config.data.train):
            return self.config.data.train
        raise DataError(
            f"{self.config.data.train} holds the rows that {self.path} was trained on; pass --data with held-out rows"
        )

    def evaluate(
        self,
        mode: str,
        source: str | None = None,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        progress: Progress = lambda done, total: None,
    ) -> Evaluation:
        """Evaluate one mode on held-out rows, by default the "test" split of the run's data set.

        Args:
            mode: one of ``modes``.
            source: a data set as in ``DataConfig.train``.
            split: of a data set that has splits.
            limit: use only the first so many rows.
            batch_size: rows at a time; padded on the left, with a cache.
            max_new_tokens: by default enough for the longest true answer.
            progress: called with the rows finished and their total.

        Raises:
            DataError: if the rows cannot be read, or would be the training rows.
        """
        data = self.config.data
        rows = load_rows(source or self._held_out(), split, limit)
        fields = FieldNames.from_config(data)
        pad = self.tokenizer.pad_token_id
        with self.mode(mode) as model:
            if self.config.task == "classification":
                encoded = encode_classification(rows, self.tokenizer, fields, data.max_length, "truncate")[0]
                return evaluate_classes(model, encoded, ClassificationCollator(pad), batch_size, progress)
            encoded = encode_rows(rows, self.tokenizer, fields, data.max_length, "truncate", True, data.chat_template)[
                0
            ]
            prompts = encode_prompts(rows, self.tokenizer, fields, data.max_length, data.chat_template)
            return evaluate_generation(
                model,
                self.tokenizer,
                [prompt.input_ids for prompt in prompts],
                [prompt.target for prompt in prompts],
                encoded,
                CausalCollator(pad),
                max_new_tokens,
                batch_size,
                progress,
            )


def read_run_config(path: Path) -> TrainConfig:
    """Read the resolved settings of a run directory; raises CheckpointError if there is none."""
    file = path / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a run directory: it has no config.yaml")
    return replace(load_config(TrainConfig, file, []), output=str(path))
