"""Tiny comparisons, and rows of results that nobody had to compute."""

from pathlib import Path
from typing import Any

from shadowtune.comparison import worker
from shadowtune.config.checking import from_mapping
from shadowtune.config.comparison import CompareConfig
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
    """Works in this process, where a worker would have one of its own."""

    def __init__(self, name: str, module: str, way_out: str, environment: dict[str, str]) -> None:
        self.name = name

    def call(self, method: str, **arguments: Any) -> Any:
        return {"run": worker.run}[method](**arguments)

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
