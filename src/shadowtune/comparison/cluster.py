"""Execution of a comparison's jobs by the scheduler of a cluster, through submitit: a job of the scheduler for each.

A job outlives the program that submitted it. Its number is kept beside its log, so that the same comparison, started
again, waits for it rather than submitting it twice.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.config.cluster import ClusterConfig
from shadowtune.errors import ConfigError, ShadowtuneError

if TYPE_CHECKING:
    import submitit

    from shadowtune.comparison.job import Job

POLL_SECONDS = 1.0
"""Seconds between two polls of a job; submitit asks the scheduler itself at most every few seconds."""
VISIBLE_SECONDS = 60.0
"""Seconds in which a network file system must show what a node has written."""
COMMANDS = ("sbatch", "srun", "sacct", "scancel")
"""Programs of Slurm that submitit calls."""


class ClusterRun:
    """The work of one job on a node: calls a function, and is queued again after preemption or its time limit."""

    def __call__(self, function: "Callable[[Job], None]", job: "Job") -> str | None:
        """Call ``function(job)``; return the message of an error that it raised on purpose, or None."""
        try:
            function(job)
        except ShadowtuneError as error:
            return str(error)
        return None

    def checkpoint(self, function: "Callable[[Job], None]", job: "Job") -> Any:
        """Return what submitit queues again: the same call, which continues from the run's last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, function, job)


class Cluster:
    """A scheduler that executes jobs.

    Args:
        config: what each job asks for.
        folder: directory of logs and of the numbers of submitted jobs, on a file system that the nodes share.

    Raises:
        ConfigError: if submitit or the scheduler is not installed, or submitit refuses a setting.
    """

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError(
                "cluster needs submitit, which is not installed: pip install 'shadowtune[cluster]', or leave cluster "
                "out to run on this machine"
            ) from None
        missing = [name for name in COMMANDS if config.scheduler == "slurm" and shutil.which(name) is None]
        if missing:
            raise ConfigError(
                f"cluster.scheduler is slurm, but this machine has no {', '.join(missing)}; start the comparison on a "
                "login node of the cluster, or set cluster.scheduler=local"
            )
        self.scheduler, self.folder = config.scheduler, folder.absolute()
        self.executor = submitit.AutoExecutor(
            self.folder, cluster=config.scheduler, slurm_max_num_timeout=config.requeues
        )
        self.job_class: type[submitit.Job[str | None]] = (
            submitit.SlurmJob if config.scheduler == "slurm" else submitit.LocalJob
        )
        self.executor.update_parameters(**_parameters(config))
        self.lock = threading.Lock()
        """Held while submitit is called: its record of the scheduler's states is shared by all jobs."""

    def worker(self, job: "Job") -> "ClusterWorker":
        """Return what executes one job."""
        return ClusterWorker(self, job)


class ClusterWorker:
    """One job of the scheduler, with the interface of ``WorkerProcess``."""

    def __init__(self, cluster: Cluster, job: "Job") -> None:
        self.name = job.name
        self._cluster = cluster
        self._record = cluster.folder / f"{job.name.replace('/', '--')}--{job.stage}.job"
        self._killed = threading.Event()

    def call(self, function: "Callable[[Job], None]", job: "Job") -> None:
        """Run ``function(job)`` on a node, or wait for an earlier submission of it, and wait for the result file.

        Raises:
            ShadowtuneError: if it cannot be submitted, fails, is cancelled, or its result is not visible here.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        try:
            with self._cluster.lock:
                submitted = self._earlier() or self._submit(function, job)
        except (FailedSubmissionError, FailedJobError) as error:
            raise ShadowtuneError(f"{self.name}: the scheduler refused the job: {_last_line(str(error))}") from None
        while not self._is_done(submitted):
            if self._killed.wait(POLL_SECONDS):
                submitted.cancel(check=False)
                raise ShadowtuneError(f"{self.name}: its job {submitted.job_id} was cancelled")
        try:
            message = submitted.result()
        except UncompletedJobError:
            raise self._death(submitted) from None
        if message is not None:
            raise ShadowtuneError(f"{self.name}: {message}")
        _wait_for_result(job)

    def _submit(self, function: "Callable[[Job], None]", job: "Job") -> "submitit.Job[str | None]":
        submitted = self._cluster.executor.submit(ClusterRun(), function, job)
        self._record.write_text(f"{self._cluster.scheduler} {submitted.job_id}")
        return submitted

    def _earlier(self) -> "submitit.Job[str | None] | None":
        """Return the job of an earlier submission that is still queued or running."""
        if not self._record.is_file():
            return None
        scheduler, _, number = self._record.read_text().partition(" ")
        if scheduler != self._cluster.scheduler or not number:
            return None
        earlier = self._cluster.job_class(self._cluster.folder, number)
        return None if earlier.done(force_check=True) else earlier

    def _is_done(self, submitted: "submitit.Job[str | None]") -> bool:
        with self._cluster.lock:
            return submitted.done()

    def _death(self, submitted: "submitit.Job[str | None]") -> ShadowtuneError:
        """Return the error of a job that ended without a result."""
        last = _last_line(submitted.stderr() or "")
        state = submitted.state.lower()
        return ShadowtuneError(
            f"the job {submitted.job_id} of {self.name} ended ({state}){': ' if last else ''}{last}; its log is "
            f"{submitted.paths.stderr}"
        )

    def kill(self) -> None:
        """Let a pending ``call`` cancel the job and raise."""
        self._killed.set()

    def __enter__(self) -> "ClusterWorker":
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the job as it is: it has ended, or has been cancelled."""


def _parameters(config: ClusterConfig) -> dict[str, Any]:
    """Return the settings as parameters of ``submitit.AutoExecutor``."""
    found: dict[str, Any] = {
        "name": "shadowtune",
        "timeout_min": config.minutes,
        "gpus_per_node": config.gpus_per_run,
        "cpus_per_task": config.cpus_per_run,
        "tasks_per_node": 1,
        "nodes": 1,
        f"{config.scheduler}_setup": config.setup,
    }
    if config.memory_gb is not None:
        found["mem_gb"] = config.memory_gb
    if config.scheduler == "slurm":
        found["slurm_additional_parameters"] = config.options
        if config.partition is not None:
            found["slurm_partition"] = config.partition
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _wait_for_result(job: "Job") -> None:
    """Wait until the result of a finished job is visible on this machine, in place of that of an earlier failure.

    Raises:
        ShadowtuneError: if it does not appear.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not job.is_done():
        if time.monotonic() > deadline:
            raise ShadowtuneError(
                f"{job.name}: its job has finished, but {job.result_file} is not visible here after "
                f"{VISIBLE_SECONDS:.0f} s; set output to a directory that the nodes share with this machine"
            )
        time.sleep(POLL_SECONDS)
