"""Execution of the jobs of a comparison: a process or a cluster's job for each, several at a time, no job twice."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import torch

from shadowtune.comparison.cluster import Cluster, ClusterWorker
from shadowtune.comparison.estimate import TimeLeft
from shadowtune.comparison.job import Job
from shadowtune.comparison.worker import run
from shadowtune.comparison.worker_process import WorkerProcess
from shadowtune.errors import ShadowtuneError
from shadowtune.tables import duration

Report = Callable[[str], None]
"""Called with lines for the user."""


class Executor:
    """Executes jobs in processes of their own.

    Args:
        jobs: number of jobs at the same time.
        devices: CUDA devices to spread them over; None leaves the choice to each process.
        report: called with a line for each job.
        cluster: executes the jobs in place of processes of this machine.
    """

    def __init__(
        self,
        jobs: int = 1,
        devices: Sequence[int] | None = None,
        report: Report = lambda line: None,
        cluster: Cluster | None = None,
    ) -> None:
        self._jobs, self._report, self._cluster = jobs, report, cluster
        self._environments: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for index in range(jobs):
            self._environments.put(_variables(index, jobs, devices))
        self._alive: set[WorkerProcess | ClusterWorker] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job], done: Callable[[], object] = lambda: None) -> None:
        """Execute those jobs that are not done yet. The error of a failed job is its result; the others go on.

        Args:
            jobs: the jobs.
            done: called after each.
        """
        pending = [job for job in jobs if not job.is_done()]
        if len(pending) < len(jobs):
            self._report(f"{len(jobs) - len(pending)} of {len(jobs)} runs are done already")
        left = TimeLeft(pending, [row for job in jobs if (row := job.result()) is not None], self._jobs)
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._execute, job): job for job in pending}
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
                if waiting:  # Ctrl-C does not reach the processes; they are ended here
                    self._stop()
                    pool.shutdown(cancel_futures=True)

    def _execute(self, job: Job) -> float:
        """Run a job in a process or on the cluster and return its seconds; an error becomes its result."""
        environment, start = self._environments.get(), time.perf_counter()
        try:
            with self._start(job, environment) as worker:
                with self._lock:
                    self._alive.add(worker)
                    if self._stopped:
                        worker.kill()
                try:
                    worker.call(run, job)
                finally:
                    with self._lock:
                        self._alive.discard(worker)
        except ShadowtuneError as error:
            if not self._stopped:
                seconds = time.perf_counter() - start
                job.write(error=str(error), training=None, evaluations=[], seconds=seconds, provenance=None)
        finally:
            self._environments.put(environment)
        return time.perf_counter() - start

    def _start(self, job: Job, environment: Mapping[str, str]) -> WorkerProcess | ClusterWorker:
        if self._cluster is not None:
            return self._cluster.worker(job)
        return WorkerProcess(job.name, "look at its settings", environment)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for worker in self._alive:
                worker.kill()


def _variables(index: int, jobs: int, devices: Sequence[int] | None) -> dict[str, str]:
    """Environment variables of one of the concurrent processes: its device, and its share of the processor."""
    variables = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if devices:
        variables["CUDA_VISIBLE_DEVICES"] = str(devices[index % len(devices)])
    return variables


def describe(row: Mapping[str, Any]) -> str:
    """Return a line with the outcome of a run."""
    setting = "".join(f" {key}={value}" for key, value in row["setting"].items())
    if row["error"]:
        return f"{row['run']}{setting}: failed: {row['error']}"
    found = [f"{each['task']} {each['mode']} {100 * each['accuracy']:.1f} %" for each in row["evaluations"]]
    return f"{row['run']}{setting}: {', '.join(found)} in {duration(row['seconds'])}"
