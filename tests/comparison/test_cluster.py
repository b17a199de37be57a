"""Runs as jobs of a scheduler: submitit's local one, and Slurm with stand-ins for its programs."""

import os
import signal
import sys
import threading
import time

import pytest

from shadowtune.comparison import cluster, execution
from shadowtune.comparison.cluster import Cluster
from shadowtune.comparison.execution import Executor
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import compare
from shadowtune.config.cluster import ClusterConfig
from shadowtune.errors import ConfigError, ShadowtuneError
from tests.support import fake_slurm
from tests.support.cluster_jobs import QuickJob, work
from tests.support.comparisons import InventedWorker, compare_config

CPU = {"gpus_per_run": 0, "cpus_per_run": 1}


@pytest.fixture
def submitit(monkeypatch):
    """The package, with short waits for files that will not come; jobs do ``work``."""
    submitit = pytest.importorskip("submitit")
    for kind in (submitit.LocalJob, submitit.SlurmJob):
        monkeypatch.setattr(kind, "_results_timeout_s", 0)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(execution, "run", work)
    return submitit


@pytest.fixture
def slurm(submitit, tmp_path, monkeypatch):
    """A machine with Slurm's programs; the directory of their states."""
    fake_slurm.install(tmp_path / "programs", tmp_path / "states")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    submitit.SlurmJob.watcher._registered.clear()  # other tests' jobs
    return tmp_path / "states"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_job_runs_in_the_scheduler_and_a_failed_or_killed_one_costs_no_other(submitit, tmp_path):
    jobs = [QuickJob(tmp_path, task) for task in ("good", "wrong", "broken", "killed")]
    lines = []
    Executor(4, None, lines.append, Cluster(ClusterConfig(scheduler="local", **CPU), tmp_path / "logs")).run(jobs)
    good, wrong, broken, killed = (each.result() for each in jobs)
    assert good["error"] is None and good["provenance"]["pid"] != os.getpid()
    assert wrong["error"] == f"{jobs[1].name}: there is no such base"
    assert broken["error"].startswith("the job ") and "ZeroDivisionError: 1 / 0" in broken["error"]
    assert str(tmp_path / "logs") in killed["error"] and "\n" not in killed["error"]
    assert len(lines) == 4 and sum("failed: " in line for line in lines) == 3
    assert [each.is_done() for each in jobs] == [True, False, False, False]


def test_slurm_gets_what_is_asked_for_and_a_refusal_is_one_line(slurm, tmp_path):
    asked = ClusterConfig(
        partition="gpu",
        gpus_per_run=1,
        cpus_per_run=4,
        memory_gb=32,
        minutes=90,
        setup=["export SHADOWTUNE_SETUP=1"],
        options={"account": "mine", "constraint": "h100"},
    )
    good, refused = QuickJob(tmp_path, "good"), QuickJob(tmp_path, "other")
    Executor(1, None, cluster=Cluster(asked, tmp_path / "logs")).run([good])
    assert good.is_done()
    script = (slurm / "1.sbatch").read_text()
    for line in ("partition=gpu", "gpus-per-node=1", "cpus-per-task=4", "mem=32GB", "time=90", "account=mine"):
        assert f"#SBATCH --{line}\n" in script
    assert "\nexport SHADOWTUNE_SETUP=1\n" in script and "--constraint=h100" in script
    (slurm / "refuse").touch()
    Executor(1, None, cluster=Cluster(asked, tmp_path / "logs")).run([refused])
    error = refused.result()["error"]
    assert error == f"{refused.name}: the scheduler refused the job: sbatch: error: invalid partition specified: no"


def test_a_job_that_outlived_its_comparison_is_waited_for_and_not_submitted_again(slurm, tmp_path):
    slow, config = QuickJob(tmp_path, "slow"), ClusterConfig(**CPU)
    Cluster(config, tmp_path / "logs").worker(slow)._submit(work, slow)  # by a program that has ended since
    wait_for((slow.path / "began").exists)
    resumed = threading.Thread(
        target=Executor(1, None, cluster=Cluster(config, tmp_path / "logs")).run, args=([slow],), daemon=True
    )
    resumed.start()
    time.sleep(0.5)
    (slow.path / "go on").touch()
    resumed.join(timeout=60)
    assert slow.is_done() and len(list(slurm.glob("*.sbatch"))) == 1


def test_a_preempted_job_is_queued_again(slurm, tmp_path):
    slow = QuickJob(tmp_path, "slow")
    executor = Executor(1, None, cluster=Cluster(ClusterConfig(**CPU), tmp_path / "logs"))
    running = threading.Thread(target=executor.run, args=([slow],), daemon=True)
    running.start()
    wait_for(lambda: (slow.path / "began").exists() and (slow.path / "began").read_text())
    process = int((slow.path / "began").read_text())
    os.kill(process, signal.SIGUSR2)  # as Slurm does before the time limit
    wait_for(lambda: int((slow.path / "began").read_text() or process) != process)
    (slow.path / "go on").touch()
    running.join(timeout=60)
    assert slow.is_done() and slow.result()["provenance"]["pid"] != process
    assert len(list(slurm.glob("*.sbatch"))) == 1


def test_ctrl_c_cancels_the_job_and_the_next_comparison_submits_it_again(slurm, tmp_path, monkeypatch):
    slow, config = QuickJob(tmp_path, "slow"), ClusterConfig(**CPU)

    def interrupted(*args, **kwargs):
        wait_for((slow.path / "began").exists)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execution, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Executor(1, None, cluster=Cluster(config, tmp_path / "logs")).run([slow])
    assert (slurm / "1.state").read_text() == "CANCELLED" and slow.result() is None
    (slow.path / "go on").touch()
    Executor(1, None, cluster=Cluster(config, tmp_path / "logs")).run([slow])
    assert slow.is_done() and len(list(slurm.glob("*.sbatch"))) == 2


def test_a_result_on_another_file_system_is_named(submitit, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "VISIBLE_SECONDS", 0.0)
    lost = QuickJob(tmp_path, "good")
    with pytest.raises(
        ShadowtuneError, match="is not visible here after 0 s; set output to a directory that the nodes"
    ):
        Cluster(ClusterConfig(scheduler="local", **CPU), tmp_path / "logs").worker(lost).call(print, lost)


def test_what_is_not_installed_is_one_line_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if "submitit" in sys.modules or _installed("submitit"):
        with pytest.raises(ConfigError, match=r"no sbatch, srun, sacct, scancel; start the comparison on a login node"):
            Cluster(ClusterConfig(), tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    config = compare_config(tmp_path, cluster={"scheduler": "local"})
    with pytest.raises(ConfigError, match=r"pip install 'shadowtune\[cluster\]'"):
        compare(Plan.of(config))


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_comparison_hands_every_run_to_its_cluster(tmp_path, monkeypatch):
    handed = []

    class Invented:
        def __init__(self, config, folder):
            assert (config.scheduler, folder) == ("local", tmp_path / "out" / "cluster")

        def worker(self, job):
            handed.append(job.name)
            return InventedWorker(job.name, "", {})

    monkeypatch.setattr("shadowtune.comparison.run.Cluster", Invented)
    results = compare(Plan.of(compare_config(tmp_path, cluster={"scheduler": "local"}, jobs=2)))
    assert sorted(handed) == sorted(row["run"] for row in results.rows) and len(handed) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": {}, "devices": [0]}, r"devices=\[0\] are of this machine, and cluster chooses its own"),
        ({"cluster": {"gpus_per_run": 2}}, "gpus_per_run"),
        ({"cluster": {"minutes": 0}}, "minutes"),
        ({"cluster": {"partitions": "x"}}, "partition"),
    ],
)
def test_wrong_settings_are_errors(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        compare_config(tmp_path, **changes)
