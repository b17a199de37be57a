"""How long a comparison will take: from its own finished runs, else roughly from what its networks compute.

A token costs 2 N floating-point operations forward, N the parameters of the blocks, as many again backward to its
inputs, and as many again where the weights are trained. The processor's speed is that of a matrix product, measured
here. Rough: padding, heads, attention and checkpoints are left out.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from shadowtune.comparison.plan import Plan
from shadowtune.comparison.sizes import base_config
from shadowtune.config.training import TrainConfig
from shadowtune.data.dataset import Dataset
from shadowtune.errors import ShadowtuneError
from shadowtune.model.budget import shapeless_base
from shadowtune.training.training_data import load_tokenizer

SAMPLE = 64
"""Training rows that are encoded to learn how long rows are."""
EFFICIENCY = 0.5
"""Share of a matrix product's speed that a network reaches."""
START = 10.0
"""Seconds that a run's process takes to begin."""
TEST_ROWS = 1000
"""Rows answered where no limit says how many."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a training row, and of these its answer's."""

    row: float
    answer: float
    rows: int
    """How many training rows there are."""


class Estimate:
    """Seconds of a plan's runs.

    Args:
        plan: the comparison.
        done: rows of results that are there already.
    """

    def __init__(self, plan: Plan, done: Iterable[Mapping[str, Any]] = ()) -> None:
        self._plan = plan
        self._seen: dict[tuple[str, str, str], list[float]] = {}
        for row in done:
            if not row["error"]:
                self._seen.setdefault((row["task"], row["method"], row["stage"]), []).append(row["seconds"])
        self._lengths: dict[str, Lengths | None] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def seconds(self, task: str, method: str, stage: str) -> float | None:
        """Return how long one run takes, training and evaluation; None if its rows cannot be read."""
        known = self._seen.get((task, method, stage))
        if known:
            return sum(known) / len(known)
        config = self._plan.config
        more = config.sweep.settings if stage == "trial" and config.sweep is not None else {}
        train = config.train_config(task, method, {**self._plan.sizes[task][method].changes, **more})
        lengths = self._lengths_of(task, train)
        if lengths is None:
            return None
        options = config.task_options(task)
        limit = options.validation_limit if stage == "trial" else options.test_limit
        operations = self._evaluation(lengths, train, limit or TEST_ROWS, stage == "final")
        if config.kind(method) != "base":
            operations += self._training(lengths, train)
        return START + operations / (EFFICIENCY * self.speed)

    @cached_property
    def speed(self) -> float:
        """Floating-point operations a second of a matrix product in float32, on the threads of this process."""
        size = 1024
        a, b = torch.ones(size, size), torch.ones(size, size)
        a @ b
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        return 4 * 2 * size**3 / (time.perf_counter() - start)

    def _training(self, lengths: Lengths, config: TrainConfig) -> float:
        """Operations of all steps of a run."""
        blocks, share = self._parameters(config)
        passes = config.epochs
        if config.max_steps is not None:
            passes = config.max_steps * config.batch_size * config.gradient_accumulation_steps / lengths.rows
        tokens = lengths.rows * lengths.row
        joint = passes * tokens * blocks * (6 if config.method == "full" else 4)
        return joint + config.shadow_epochs * tokens * 6 * share

    def _evaluation(self, lengths: Lengths, config: TrainConfig, rows: int, final: bool) -> float:
        """Operations of answering held-out rows, attached and (where there is one) detached, and of their loss."""
        blocks, share = self._parameters(config)
        tokens = rows * (2 * lengths.row + lengths.answer)
        return 2 * tokens * (blocks + (share if final and config.leaves_shadow else 0))

    def _parameters(self, config: TrainConfig) -> tuple[int, int]:
        """Parameters of the base's blocks, and of one block, which is what a shadow's usually has."""
        if config.model not in self._sizes:
            base = base_config(config)
            text = base.get_text_config(decoder=True)
            with torch.device("meta"):
                total = sum(parameter.numel() for parameter in shapeless_base(base, config.task).parameters())
            blocks = max(1, total - text.vocab_size * text.hidden_size)
            self._sizes[config.model] = (blocks, blocks // text.num_hidden_layers)
        return self._sizes[config.model]

    def _lengths_of(self, task: str, config: TrainConfig) -> Lengths | None:
        if task not in self._lengths:
            try:
                self._lengths[task] = _measure(config)
            except ShadowtuneError:
                self._lengths[task] = None
        return self._lengths[task]


def _measure(config: TrainConfig) -> Lengths:
    data = Dataset.open(config.data)
    rows = data.training_rows()
    sample = rows[:SAMPLE]
    classify = config.task == "classification"
    encoded = data.encode(sample, load_tokenizer(config.model, config.revision), classify, training=True)[0]
    tokens = sum(len(row["input_ids"]) for row in encoded)
    answers = 0 if classify else sum(sum(label != -100 for label in row["labels"]) for row in encoded)
    return Lengths(tokens / len(encoded), answers / len(encoded), len(rows))
