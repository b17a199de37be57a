import pickle
import subprocess
import sys
import threading
import time

import psutil
import pytest

from shadowtune.comparison import execution
from shadowtune.comparison.execution import Executor
from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import write_results
from shadowtune.errors import ShadowtuneError
from tests.comparison.test_job import job
from tests.support.comparisons import LocalWorker, compare_config


class IdleWorker(LocalWorker):
    """Leaves a row and does nothing; notes where it would have run."""

    places: list[dict[str, str]] = []
    busy: threading.Barrier

    def __init__(self, name, hint, environment):
        super().__init__(name, hint, environment)
        self.places.append(environment)

    def call(self, function, job):
        self.busy.wait(timeout=30)
        job.write(seconds=1.0, evaluations=[], training=None, provenance=None)


def jobs(path, count):
    return [job(path, task=f"t{number}") for number in range(count)]


@pytest.mark.parametrize(
    ("at_once", "devices", "places"),
    [
        (1, None, [{}]),
        (1, [3], [{"CUDA_VISIBLE_DEVICES": "3"}]),
        (2, None, [{"OMP_NUM_THREADS": "1"}] * 2),
        (
            2,
            [3, 5],
            [
                {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1"},
                {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "1"},
            ],
        ),
    ],
)
def test_jobs_at_the_same_time_have_a_device_and_a_share_of_the_processor_each(
    at_once, devices, places, tmp_path, monkeypatch
):
    monkeypatch.setattr(IdleWorker, "places", [])
    monkeypatch.setattr(IdleWorker, "busy", threading.Barrier(at_once), raising=False)  # all of them, or nobody goes on
    monkeypatch.setattr(execution, "WorkerProcess", IdleWorker)
    Executor(at_once, devices).run(jobs(tmp_path, 2 * at_once))
    assert sorted(sorted(place.items()) for place in IdleWorker.places) == sorted(
        sorted(place.items()) for place in 2 * places
    )


def test_ctrl_c_ends_the_processes_and_starts_no_other(tmp_path, monkeypatch):
    started, killed, dead = [], [], threading.Event()

    class Endless(LocalWorker):
        def call(self, function, job):
            started.append(self.name)
            assert dead.wait(timeout=60)
            raise ShadowtuneError("the process ended: killed")

        def kill(self):
            killed.append(self.name)
            dead.set()

    def interrupted(*args, **kwargs):
        while not started:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "WorkerProcess", Endless)
    monkeypatch.setattr(execution, "wait", interrupted)
    todo = jobs(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        Executor().run(todo)
    assert killed == started == [todo[0].name]
    assert not any(each.result_file.exists() for each in todo)


def test_results_hold_a_row_of_each_job_that_has_one_in_the_order_of_the_jobs(tmp_path):
    first, second, third = jobs(tmp_path, 3)
    third.write(seconds=3.0, evaluations=[], training=None, provenance=None)
    first.write(error="no", seconds=1.0, evaluations=[], training=None, provenance=None)
    rows = write_results(tmp_path / "results.jsonl", [first, second, third])
    assert [row["task"] for row in rows] == ["t0", "t2"]
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 2


EXECUTE = """
import pathlib, pickle, sys
from shadowtune.comparison.execution import Executor

if __name__ == "__main__":
    Executor().run([pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())])
"""


def test_the_process_of_a_run_dies_with_the_one_that_started_it(tmp_path):
    (endless,) = Plan.of(compare_config(tmp_path, methods={"lora": {"max_steps": 100000}})).finals()
    (tmp_path / "execute.py").write_text(EXECUTE)
    (tmp_path / "job").write_bytes(pickle.dumps(endless))
    parent = psutil.Popen([sys.executable, tmp_path / "execute.py", tmp_path / "job"], stderr=subprocess.DEVNULL)
    while not (endless.path / "metrics.jsonl").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 1
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while workers[0].is_running() and workers[0].status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers[0].is_running() or workers[0].status() == psutil.STATUS_ZOMBIE
    assert not endless.is_done()
