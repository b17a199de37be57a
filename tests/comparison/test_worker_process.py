import operator
import os
import signal
import threading
import time

import pytest

from shadowtune.comparison.worker_process import WorkerProcess
from shadowtune.config.settings import check_range
from shadowtune.errors import ShadowtuneError


class Wrong:
    size = 0


def noisy(value):
    print("noise")
    os.write(1, b"more noise\n")
    return value


def test_functions_run_in_a_process_of_their_own_until_the_end(capfd):
    with WorkerProcess("base", "try a smaller one", {"MINE": "1"}) as worker:
        assert worker.call(os.getpid) == worker._process.pid != os.getpid()
        assert os.getsid(worker._process.pid) != os.getsid(0)  # out of reach of Ctrl-C
        assert worker.call(os.getenv, "MINE") == "1"
        assert "MINE" not in os.environ
        with pytest.raises(ShadowtuneError, match=r"base: size must be at least 1, got 0"):
            worker.call(check_one, 0)
        assert worker.call(noisy, {"a": (1, 2)}) == {"a": (1, 2)}
        with pytest.raises(
            ShadowtuneError, match=r"the process of base ended: KeyError: 'dance'; try a smaller"
        ) as died:
            worker.call(operator.getitem, {}, "dance")
        assert "\n" not in str(died.value)
    assert worker._process.exitcode == 1
    assert "noise" not in "".join(capfd.readouterr())


def check_one(size):
    wrong = Wrong()
    wrong.size = size
    check_range(wrong, size=(1, None))


def test_a_process_that_the_system_kills_is_one_line():
    with WorkerProcess("lora", "wait") as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.join()
        with pytest.raises(
            ShadowtuneError, match="the process of lora ended: killed, perhaps for want of memory; wait"
        ):
            worker.call(os.getpid)


def test_leaving_early_ends_the_process_and_leaves_no_file():
    with pytest.raises(RuntimeError), WorkerProcess("base", "") as worker:
        raise RuntimeError
    assert worker._process.exitcode == -signal.SIGKILL
    assert not worker._log.exists()


def test_a_killed_worker_ends_the_call_that_waits_for_it():
    with WorkerProcess("base", "") as worker:
        threading.Timer(1.0, worker.kill).start()
        with pytest.raises(ShadowtuneError, match="killed"):
            worker.call(time.sleep, 600)
