"""``compare``: from settings to results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.comparison.execution import Executor, restore_results, write_results
from shadowtune.comparison.job import Job
from shadowtune.comparison.plan import Plan, run_path
from shadowtune.comparison.sweep import best_settings
from shadowtune.data.dataset import Dataset
from shadowtune.errors import DataError

RESULTS = "results.jsonl"


def compare(plan: Plan, report: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Do every run of a plan that is not done yet, trials first, and keep a row of each in ``results.jsonl``.

    That file alone is enough to go on from: a run with a row in it is done, even if its directory is gone.

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
    restore_results(file, run_path(config))
    executor = Executor(config.jobs, config.devices, report)
    trials = plan.trials()
    check_training_rows(trials or plan.finals())
    if trials:
        report(f"sweep: {len(trials)} trials, on validation rows")
        executor.run(trials, lambda: write_results(file, trials))
    chosen = _chosen(plan, trials)
    for (task, method), setting in (chosen or {}).items():
        report(f"sweep: {task}, {method}: {', '.join(f'{key}={value}' for key, value in setting.items())}")
    finals = plan.finals(chosen)
    executor.run(finals, lambda: write_results(file, [*trials, *finals]))
    return write_results(file, [*trials, *finals])


def rows_done(plan: Plan) -> list[dict[str, Any]]:
    """Return the rows of the runs of a plan that are done, trials first, and run nothing.

    With a sweep, the runs of a method on a task count as soon as all of its trials are done.
    """
    file = Path(plan.config.output) / RESULTS
    restore_results(file, run_path(plan.config))
    trials = plan.trials()
    open_ones = {(job.task, job.method) for job in trials if job.result() is None}
    tried = [job for job in trials if (job.task, job.method) not in open_ones]
    return write_results(file, [*trials, *plan.finals(_chosen(plan, tried))])


def _chosen(plan: Plan, trials: Sequence[Job]) -> dict[tuple[str, str], dict[str, Any]] | None:
    """The best settings by (task, method), of trials that have been done; None without a sweep."""
    sweep = plan.config.sweep
    return None if sweep is None else best_settings(trials, sweep.select)


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
