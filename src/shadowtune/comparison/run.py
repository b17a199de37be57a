"""Run a comparison: execute its plan, and keep a row of each run in ``results.jsonl``."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowtune.comparison.budgets import EqualCosts, Unmet, merged
from shadowtune.comparison.cluster import Cluster
from shadowtune.comparison.execution import Executor
from shadowtune.comparison.job import Job, damaged, read_json, results_version, write_json
from shadowtune.comparison.plan import Chosen, Plan, Search, run_path
from shadowtune.data.dataset import Dataset
from shadowtune.errors import DataError
from shadowtune.model.files import writing_into

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Results:
    """Results of a comparison: rows of its runs, and what could not be run or counted."""

    rows: list[dict[str, Any]]
    """Result rows of all runs that are done or have failed, trials first."""
    unmet: list[Unmet] = field(default_factory=list)
    """Methods without a run at equal time or memory."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Methods that cannot be compared at all: task, method and reason."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Earlier results of the same settings by another version or on other examples: run and reason."""


def compare(plan: Plan, report: Callable[[str], None] = lambda line: None) -> Results:
    """Execute every run of a plan that is not done yet, trials first, and keep a row of each in ``results.jsonl``.

    A run with a row in that file is done, even if its directory is gone.

    Args:
        plan: the comparison.
        report: called with lines for the user.

    Returns:
        The results. A method has no final run on a task where all of its trials failed.

    Raises:
        DataError: if a task that is not done yet has no training examples.
        ConfigError: if the cluster cannot be used from this machine.
    """
    config = plan.config
    file = Path(config.output) / RESULTS
    cluster = None if config.cluster is None else Cluster(config.cluster, Path(config.output) / "cluster")
    restore_results(file, run_path(config))
    for row in plan.refused():
        report(f"not compared: {row['task']}, {row['method']}: {row['why']}")
    executor = Executor(config.jobs, config.devices, report, cluster)
    searches = plan.searches()
    trials = _trials(searches.values())
    check_training_rows(trials or plan.finals())
    begun: set[Path] = set()
    while fresh := [job for job in trials if job.result_file not in begun]:
        begun |= {job.result_file for job in fresh}
        report(f"sweep: {len(fresh)} trials, on validation rows")
        executor.run(fresh, lambda done=tuple(trials): write_results(file, done))  # type: ignore[misc]
        trials = _trials(searches.values())
    chosen = _chosen(searches)
    for (tasks, method), search in searches.items():
        if (setting := search.chosen()) is not None:
            shown = ", ".join(f"{key}={value}" for key, value in setting.items())
            report(f"sweep: {', '.join(tasks)}, {method}: {shown}")
    finals = plan.finals(chosen)
    executor.run(finals, lambda: write_results(file, [*trials, *finals]))
    costs = EqualCosts(plan, chosen, finals)
    begun |= {job.result_file for job in finals}
    finals = merged([*finals, *costs.jobs()])
    for each in costs.unmet:
        report(f"not compared at equal {each.column}: {each.task}, {each.method}: {each.why}")
    if fresh := [job for job in finals if job.result_file not in begun]:
        report(f"equal {' and '.join(costs.columns())}: {len(fresh)} runs")
        executor.run(fresh, lambda: write_results(file, [*trials, *finals]))
    rows = write_results(file, [*trials, *finals])
    return Results(rows, costs.unmet, plan.refused(), other_results([*trials, *finals]))


def rows_done(plan: Plan) -> Results:
    """Return the results of the runs of a plan that are done, trials first, and run nothing.

    With a sweep, the runs of a method on a task count as soon as all of its trials are done.
    """
    file = Path(plan.config.output) / RESULTS
    restore_results(file, run_path(plan.config))
    searches = plan.searches()
    trials, finals = _trials(searches.values()), plan.finals(_chosen(searches))
    costs = EqualCosts(plan, _chosen(searches), finals)
    finals = merged([*finals, *costs.jobs()])
    rows = write_results(file, [*trials, *finals])
    return Results(rows, costs.unmet, plan.refused(), other_results([*trials, *finals]))


def rows_on_disk(plan: Plan) -> list[dict[str, Any]]:
    """Return the result rows of all runs in the comparison's directory, whatever their settings."""
    return [
        read_json(file) for stage in ("trial", "final") for file in run_path(plan.config).glob(f"*/*/*/{stage}.json")
    ]


def _trials(searches: Iterable[Search]) -> list[Job]:
    return merged([job for search in searches for job in search.trials()])


def _chosen(searches: Mapping[tuple[tuple[str, ...], str], Search]) -> Chosen | None:
    """The best settings by (task, method) of finished searches; None without a sweep."""
    if not searches:
        return None
    found: Chosen = {}
    for (tasks, method), search in searches.items():
        setting = search.chosen()
        if setting is not None:
            found |= {(task, method): setting for task in tasks}
    return found


def check_training_rows(jobs: Sequence[Job]) -> None:
    """Read the training examples of each task with a pending job: now, rather than after hours with other tasks.

    Raises:
        DataError: naming the task whose examples are missing.
    """
    for task, job in {job.task: job for job in jobs if not job.is_done()}.items():
        try:
            Dataset.open(job.config.data).training_rows()
        except DataError as error:
            raise DataError(f"task {task}: {error}; only=[...] names the tasks to do") from None


def failures(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of failed runs; failed trials only if all trials of the method failed."""
    counted = {row["method"] for row in rows if row["stage"] == "final"}
    counted_on = {(row["task"], row["method"]) for row in rows if row["stage"] == "final"}

    def chosen_without(row: Mapping[str, Any]) -> bool:
        """Whether another trial was chosen, on its task or for all tasks."""
        tasks = {each["task"] for each in rows if each["stage"] == "final"}
        return (row["task"], row["method"]) in counted_on or (row["task"] not in tasks and row["method"] in counted)

    return [row for row in rows if row["error"] and (row["stage"] == "final" or not chosen_without(row))]


def other_results(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return earlier results of the same settings by another version of this package, or on other examples."""
    found, mine = [], {job.result_file for job in jobs}
    for job in jobs:
        pattern = f"{'seed-' + str(job.seed) if job.trains else 'untrained'}-*/{job.stage}.json"
        for file in sorted(job.path.parent.glob(pattern)):
            if file in mine:
                continue
            row = read_json(file)
            if not _agree(row.get("config"), json.loads(json.dumps(dataclasses.asdict(job.config)))):
                continue
            version = row.get("version")
            why = "other rows" if version == results_version() else f"version {version or 'unknown'}"
            found.append({"run": row["run"], "why": f"made with {why}"})
    return list({each["run"]: each for each in found}.values())


def _agree(before: Any, now: Any) -> bool:
    """Whether two settings agree in all keys that both have."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_agree(before[key], now[key]) for key in before.keys() & now.keys())
    return bool(before == now)


def restore_results(file: Path, runs: Path) -> None:
    """Write each row of ``results.jsonl`` into its run directory, where the run's own copy is missing.

    Args:
        file: may be missing.
        runs: directory of the run directories.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if not file.is_file():
        return
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        files = {runs / row["run"] / f"{row['stage']}.json": row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(file, error) from None
    for path, row in files.items():
        if not path.is_file():
            write_json(path, row)


def write_results(file: Path, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Write the rows of those jobs that have one as JSON lines, atomically, and return them."""
    rows = [row for job in jobs if (row := job.result()) is not None]
    with writing_into(file.parent) as staging, (staging / file.name).open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return rows
