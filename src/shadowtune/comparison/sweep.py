"""The search for settings: which trial was best on validation rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from shadowtune.comparison.job import Job


def best_settings(trials: Sequence[Job], select: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the settings of the best trial by (task, method); those of which every trial failed are left out.

    Args:
        trials: trials that have been done.
        select: "accuracy" (the loss decides where two are equal) or "loss".
    """
    groups: dict[tuple[str, str], list[tuple[Job, Mapping[str, Any]]]] = {}
    for job in trials:
        row = job.result()
        assert row is not None, "the trial has not been done"
        groups.setdefault((job.task, job.method), []).append((job, row))
    chosen = {}
    for (task, method), done in groups.items():
        sound = [(job, row["evaluations"][0]) for job, row in done if row["error"] is None]
        if sound:
            chosen[task, method] = max(sound, key=lambda pair: _merit(pair[1], select))[0].setting
    return chosen


def _merit(evaluation: Mapping[str, Any], select: str) -> tuple[float, ...]:
    loss = -evaluation["loss"]
    return (evaluation["accuracy"], loss) if select == "accuracy" else (loss,)
