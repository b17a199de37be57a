"""Do the jobs of a comparison: a process each, several at a time, none twice."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shadowtune.benchmark.process import WorkerProcess
from shadowtune.comparison.job import Job, damaged, write_json
from shadowtune.comparison.progress import TimeLeft, describe
from shadowtune.errors import ShadowtuneError
from shadowtune.model.files import writing_into

Report = Callable[[str], None]
"""Called with lines for the user."""


class Executor:
    """Does jobs in processes of their own.

    Args:
        jobs: how many at the same time.
        devices: CUDA devices to spread them over; None leaves the choice to each process.
        report: called with a line for each job.
    """

    def __init__(self, jobs: int = 1, devices: Sequence[int] | None = None, report: Report = lambda line: None) -> None:
        self._jobs, self._report = jobs, report
        self._slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(_environment(slot, jobs, devices))
        self._alive: set[WorkerProcess] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job], done: Callable[[], object] = lambda: None) -> None:
        """Do those jobs that are not done yet. A job that fails leaves its error and does not stop the others.

        Args:
            jobs: the jobs.
            done: called after each.
        """
        pending = [job for job in jobs if not job.is_done()]
        if len(pending) < len(jobs):
            self._report(f"{len(jobs) - len(pending)} of {len(jobs)} runs are done already")
        left = TimeLeft(pending, [row for job in jobs if (row := job.result()) is not None], self._jobs)
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._do, job): job for job in pending}
            waiting = set(futures)
            try:
                while waiting:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        job = futures[future]
                        left.finish(job, future.result())
                        row = job.result()
                        assert row is not None
                        count = len(pending) - len(left.jobs)
                        self._report(f"[{count}/{len(pending)}] {describe(row)}; {left}")
                        done()
            finally:
                if waiting:  # Ctrl-C: the processes do not get it, and are ended here
                    self._stop()
                    pool.shutdown(cancel_futures=True)

    def _do(self, job: Job) -> float:
        """Do a job in a process and return how many seconds it took; what stops it becomes its result."""
        slot, start = self._slots.get(), time.perf_counter()
        try:
            with WorkerProcess(job.name, "shadowtune.comparison.worker", "look at its settings", slot) as worker:
                with self._lock:
                    self._alive.add(worker)
                    if self._stopped:
                        worker.kill()
                try:
                    worker.call("run", job=asdict(job))
                finally:
                    with self._lock:
                        self._alive.discard(worker)
        except ShadowtuneError as error:
            if not self._stopped:
                seconds = time.perf_counter() - start
                job.write(error=str(error), training=None, evaluations=[], seconds=seconds, provenance=None)
        finally:
            self._slots.put(slot)
        return time.perf_counter() - start

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for worker in self._alive:
                worker.kill()


def _environment(slot: int, jobs: int, devices: Sequence[int] | None) -> dict[str, str]:
    """Variables of the processes in one of the places: its device, and its share of the processor."""
    variables = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if devices:
        variables["CUDA_VISIBLE_DEVICES"] = str(devices[slot % len(devices)])
    return variables


def restore_results(file: Path, runs: Path) -> None:
    """Give each row of a file that ``write_results`` wrote back to its run, where the run's own copy is gone.

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
        places = {runs / row["run"] / f"{row['stage']}.json": row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(file, error) from None
    for place, row in places.items():
        if not place.is_file():
            write_json(place, row)


def write_results(file: Path, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Write the rows of those jobs that have one as JSON lines, whole or not at all, and return them."""
    rows = [row for job in jobs if (row := job.result()) is not None]
    with writing_into(file.parent) as staging, (staging / file.name).open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return rows
