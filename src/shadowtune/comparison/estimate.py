"""Estimates of the time of a comparison: from its own finished runs, else from floating-point operations.

A token costs 2 N floating-point operations forward, N the parameters of the blocks, as many again backward to its
inputs, and as many again where the weights are trained. The processor's speed is that of a matrix product. Padding,
heads, attention and checkpoints are neglected: a comparison has many runs, and ``shadowtune plan`` counts one exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shadowtune.comparison.job import Job
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.sizes import base_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ShadowtuneError
from shadowtune.model.budget import shapeless_base
from shadowtune.model.speed import EFFICIENCY, product_speed
from shadowtune.tables import duration
from shadowtune.training.planning import Lengths, measure_lengths

SAMPLE = 64
"""Training examples that are encoded to measure their lengths."""
START = 10.0
"""Seconds that a run's process takes to start."""
TEST_ROWS = 1000
"""Test examples where no limit is set."""


class TimeEstimate:
    """Estimated seconds of a plan's runs.

    Args:
        plan: the comparison.
        done: result rows of finished runs.
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
        """Return the seconds of one run, training and evaluation; None if its examples cannot be read."""
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
        return START + operations / (EFFICIENCY * product_speed())

    def _training(self, lengths: Lengths, config: TrainConfig) -> float:
        """Operations of all steps of a run."""
        blocks, share = self._parameters(config)
        assert lengths.rows is not None  # measured
        passes = config.epochs
        if config.max_steps is not None:
            passes = config.max_steps * config.batch_size * config.gradient_accumulation_steps / lengths.rows
        tokens = lengths.rows * lengths.row
        joint = passes * tokens * blocks * (6 if config.method == "full" else 4)
        return joint + config.shadow_epochs * tokens * 6 * share

    def _evaluation(self, lengths: Lengths, config: TrainConfig, rows: int, final: bool) -> float:
        """Operations of answers to held-out examples, attached and (if there is one) detached, and of their loss."""
        blocks, share = self._parameters(config)
        tokens = rows * (2 * lengths.row + lengths.answer)
        return 2 * tokens * (blocks + (share if final and config.leaves_shadow else 0))

    def _parameters(self, config: TrainConfig) -> tuple[int, int]:
        """Parameters of the base's blocks, and of one block, the usual size of a shadow."""
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
                self._lengths[task] = measure_lengths(config, SAMPLE)
            except ShadowtuneError:
                self._lengths[task] = None
        return self._lengths[task]


class TimeLeft:
    """Remaining time of jobs, from those that are done.

    A job takes as long as the mean of its task and method, else of its task, else of all.

    Args:
        jobs: those to do.
        rows: results of jobs that are done, of earlier starts too.
        at_once: number of jobs at the same time.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[Mapping[str, Any]], at_once: int) -> None:
        self.jobs, self._at_once = list(jobs), at_once
        self._seen = [(row["task"], row["method"], row["stage"], row["seconds"]) for row in rows if not row["error"]]

    def finish(self, job: Job, seconds: float) -> None:
        """Record the seconds of a finished job."""
        self.jobs.remove(job)
        self._seen.append((job.task, job.method, job.stage, seconds))

    def seconds(self) -> float | None:
        """Return the estimate; None before the first finished job."""
        if not self._seen:
            return None
        return sum(self._expect(job) for job in self.jobs) / self._at_once

    def _expect(self, job: Job) -> float:
        key = (job.task, job.method, job.stage)
        for length in (3, 2, 1, 0):
            times = [seen[3] for seen in self._seen if seen[:length] == key[:length]]
            if times:
                return sum(times) / len(times)
        raise AssertionError("called before anything was seen")

    def __str__(self) -> str:
        seconds = self.seconds()
        if not self.jobs:
            return "that was the last"
        return f"{len(self.jobs)} left" + ("" if seconds is None else f", about {duration(seconds)}")
