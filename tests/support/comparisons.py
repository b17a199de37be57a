"""Tiny comparisons, and rows of results that nobody had to compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from shadowtune.comparison.job import Job
from shadowtune.comparison.sizes import ParameterCounter
from shadowtune.config.comparison import CompareConfig
from shadowtune.config.settings import from_mapping
from shadowtune.errors import ShadowtuneError
from tests.support.commands import save_base, write_rows

SHADOW = {"rank": 4, "update_width": 3, "alpha": 1.0, "dropout": 0.0}


def compare_settings(path: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a comparison of a few steps on eight rows that are at once training, validation and test rows."""
    base, data = path / "base", path / "words"
    if not base.exists():
        save_base(base)
        data.mkdir()
        for split in ("train", "validation", "test"):
            write_rows(data / f"{split}.jsonl")
    settings = {
        "output": str(path / "out"),
        "common": {
            "model": str(base),
            "max_steps": 4,
            "batch_size": 4,
            "logging_steps": 1,
            "optimizer": {"learning_rate": 1e-2},
        },
        "tasks": {"words": {"data": {"train": str(data), "validation": str(data)}}},
        "methods": {"base": None, "lora": {"lora": {"rank": 2}}, "shadow": {"shadow": SHADOW}},
        "seeds": [1],
    }
    return {**settings, **changes}


def compare_config(path: Path, **changes: Any) -> CompareConfig:
    """The same as a config."""
    return from_mapping(CompareConfig, compare_settings(path, **changes), where="")


class LocalWorker:
    """Runs functions in this process rather than in a worker process."""

    def __init__(self, name: str, hint: str, environment: dict[str, str]) -> None:
        self.name = name

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def kill(self) -> None:
        pass

    def __enter__(self) -> "LocalWorker":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def result_row(
    method: str,
    scores: list[float],
    seed: int = 1,
    task: str = "words",
    detached: list[float] | None = None,
    mode: str = "attached",
    **changes: Any,
) -> dict[str, Any]:
    """A row as a run leaves it, with the scores of its test rows."""
    tested = [(mode, scores)] if detached is None else [(mode, scores), ("detached", detached)]
    training = {
        "trainable_parameters": 1000,
        "steps": 4,
        "train_seconds": 2.0,
        "tokens_per_second": 50.0,
        "peak_memory_mb": 300.0,
    }
    row = {
        "run": f"{task}/{method}/seed-{seed}-00000000",
        "stage": "final",
        "task": task,
        "method": method,
        "seed": seed,
        "setting": {},
        "size": None,
        "error": None,
        "seconds": 3.0,
        "training": None if mode == "base" else training,
        "evaluations": [
            {
                "task": task,
                "mode": tested_mode,
                "split": "test",
                "rows": len(values),
                "accuracy": sum(values) / len(values),
                "agreement": None,
                "loss": 1.5,
                "tokens_per_second": 70.0,
                "evaluate_seconds": 0.5 * len(values),
                "other_scores": {},
                "scores": values,
            }
            for tested_mode, values in tested
        ],
    }
    return {**row, **changes}


class InventedWorker(LocalWorker):
    """Trains nothing: leaves a row of invented numbers, so that a whole comparison takes a moment.

    A step takes ``seconds_per_step`` by method, a fit ``fit_seconds``; memory is ``memory`` by method plus 16 bytes a
    trained parameter. A test row is right with a chance that grows with ``skill``, from (method, learning rate).
    """

    seconds_per_step: ClassVar[dict[str, float]] = {}
    fit_seconds: ClassVar[dict[str, float]] = {}
    memory: ClassVar[dict[str, float]] = {}
    failing: ClassVar[set[str]] = set()
    skill: ClassVar[Any] = staticmethod(lambda method, rate: 0.5)
    calls: ClassVar[list[Job]] = []
    counter: ClassVar[ParameterCounter] = ParameterCounter()
    rows = 400

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        (job,) = arguments
        self.calls.append(job)
        if job.method in self.failing:
            raise ShadowtuneError("no room for it")
        scores = self._scores(job)
        training = self._training(job) if job.trains else None
        mean = sum(scores) / len(scores)
        evaluations = [
            {"task": request.task, "mode": request.mode, "split": request.split, "limit": request.limit,
             "rows": len(scores), "accuracy": mean, "accuracy_low": 0.0, "accuracy_high": 1.0, "loss": 1 - mean,
             "evaluate_seconds": 1.0, "tokens_per_second": 9.0, "other_scores": {}, "agreement": None,
             "scores": scores}
            for request in job.requests
        ]  # fmt: skip
        job.write(training=training, evaluations=evaluations, forgetting=None, seconds=1.0, provenance=None)

    def _scores(self, job: Job) -> list[float]:
        generator = torch.Generator().manual_seed(job.seed)
        drawn = torch.rand(self.rows, generator=generator)
        return (drawn < type(self).skill(job.method, job.config.optimizer.learning_rate)).double().tolist()

    def _training(self, job: Job) -> dict[str, Any]:
        config = job.config
        steps = config.max_steps or round(100 * config.epochs)
        fit = self.fit_seconds.get(job.method)
        parameters = self.counter.count(job.method, config)
        whole = steps * self.seconds_per_step.get(job.method, 1.0) + (fit or 0.0)
        memory = self.memory.get(job.method, 500.0) + 16 * parameters / 2**20
        return {
            "trainable_parameters": parameters, "steps": steps, "train_seconds": whole, "fit_seconds": fit,
            "tokens_per_second": 5.0, "peak_memory_mb": memory, "final_loss": 1.0,
        }  # fmt: skip
