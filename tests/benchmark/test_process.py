import os
import signal
from dataclasses import asdict

import pytest

from shadowtune.benchmark.process import WorkerProcess
from shadowtune.benchmark.train import TrainSettings
from shadowtune.errors import ShadowtuneError

SETTINGS = asdict(TrainSettings(model="tiny", batch=2, length=16))
OPEN = {"bench": "train", "settings": SETTINGS, "name": "base", "arguments": {"size": None}}


def test_a_subject_works_in_its_own_process_until_the_end():
    with WorkerProcess("base") as worker:
        assert worker._process.pid != os.getpid()
        assert os.getsid(worker._process.pid) != os.getsid(0)  # out of reach of Ctrl-C
        assert worker.call("open", **OPEN) == {"size": None, "trainable_parameters": 0, "facts": {}}
        with pytest.raises(ShadowtuneError, match=r"base: cannot load the model ./nowhere"):
            worker.call("open", **{**OPEN, "settings": {**SETTINGS, "model": "./nowhere"}})
        assert worker.call("prepare", values={"rows": 2, "length": 16, "labelled": 1.0})["peak_memory_mb"] > 0
        assert worker.call("measure") > 0
        with pytest.raises(
            ShadowtuneError, match=r"the process of base ended: KeyError: 'dance'; try a smaller"
        ) as died:
            worker.call("dance")
        assert "\n" not in str(died.value)
    assert worker._process.returncode is not None


def test_a_process_that_the_system_kills_is_one_line():
    with WorkerProcess("lora") as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        with pytest.raises(ShadowtuneError, match="the process of lora ended: killed, perhaps for want of memory"):
            worker.call("measure")


def test_leaving_early_ends_the_process():
    with pytest.raises(RuntimeError), WorkerProcess("base") as worker:
        raise RuntimeError
    assert worker._process.returncode == -signal.SIGKILL
