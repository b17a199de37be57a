"""``compare``: from settings to results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.comparison.execution import Executor, write_results
from shadowtune.comparison.job import Job
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.sweep import best_settings
from shadowtune.data.dataset import Dataset
from shadowtune.errors import DataError

RESULTS = "results.jsonl"


def compare(plan: Plan, report: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Do every run of a plan that is not done yet, trials first, and keep a row of each in ``results.jsonl``.

    Args:
        plan: the comparison.
        report: called with lines for the user.

    Returns:
        The rows, those of trials first. A method has no run that counts on a task where all of its trials failed.

    Raises:
        DataError: if a task that is not done yet has no training rows.
    """
    config = plan.config
    file = Path(config.output) / RESULTS
    executor = Executor(config.jobs, config.devices, report)
    trials = plan.trials()
    check_training_rows(trials or plan.finals())
    if trials:
        report(f"sweep: {len(trials)} trials, on validation rows")
        executor.run(trials, lambda: write_results(file, trials))
    chosen = None if config.sweep is None else best_settings(trials, config.sweep.select)
    for (task, method), setting in (chosen or {}).items():
        report(f"sweep: {task}, {method}: {', '.join(f'{key}={value}' for key, value in setting.items())}")
    finals = plan.finals(chosen)
    executor.run(finals, lambda: write_results(file, [*trials, *finals]))
    return write_results(file, [*trials, *finals])


def check_training_rows(jobs: Sequence[Job]) -> None:
    """Read the training rows of each task that has a job to do: now, rather than after hours with the other tasks.

    Raises:
        DataError: naming the task whose rows are missing.
    """
    for task, job in {job.task: job for job in jobs if not job.is_done()}.items():
        try:
            Dataset.open(job.config.data).training_rows()
        except DataError as error:
            raise DataError(f"task {task}: {error}; only=[...] names the tasks to do") from None


def failures(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of runs that failed: those that count, and trials of which none was left to choose from."""
    counted = {(row["task"], row["method"]) for row in rows if row["stage"] == "final"}
    return [
        row for row in rows if row["error"] and (row["stage"] == "final" or (row["task"], row["method"]) not in counted)
    ]
