"""What is said while a comparison runs: what a run found, and how long the rest will take."""

from collections.abc import Mapping, Sequence
from typing import Any

from shadowtune.comparison.job import Job


class TimeLeft:
    """An estimate of the time that jobs will take, from those that are done.

    A job takes as long as the mean of its task and method, else of its task, else of all.

    Args:
        jobs: those to do.
        rows: results of jobs that are done, of an earlier start too.
        at_once: jobs at the same time.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[Mapping[str, Any]], at_once: int) -> None:
        self.jobs, self._at_once = list(jobs), at_once
        self._seen = [(row["task"], row["method"], row["stage"], row["seconds"]) for row in rows if not row["error"]]

    def finish(self, job: Job, seconds: float) -> None:
        """Note that a job is done, and how long it took."""
        self.jobs.remove(job)
        self._seen.append((job.task, job.method, job.stage, seconds))

    def seconds(self) -> float | None:
        """Return the estimate; None while nothing is known."""
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


def duration(seconds: float) -> str:
    """Word a time, such as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe(row: Mapping[str, Any]) -> str:
    """Say in a line what a run found."""
    setting = "".join(f" {key}={value}" for key, value in row["setting"].items())
    if row["error"]:
        return f"{row['run']}{setting}: failed: {row['error']}"
    found = [f"{each['task']} {each['mode']} {100 * each['accuracy']:.1f} %" for each in row["evaluations"]]
    return f"{row['run']}{setting}: {', '.join(found)} in {duration(row['seconds'])}"
