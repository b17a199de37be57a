import os
import signal
import threading

import pytest

from shadowtune.training.callbacks import GracefulInterrupt


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("place", ["on_step_begin", "on_substep_end", "on_prediction_step"])
def test_the_first_ctrl_c_waits_for_the_step_to_end(place):
    stop = GracefulInterrupt()
    with stop.watching():
        vars(GracefulInterrupt)[place](stop)
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            vars(GracefulInterrupt)[place](stop)


def test_the_second_one_does_not():
    stop = GracefulInterrupt()
    with stop.watching():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with GracefulInterrupt().watching():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(ZeroDivisionError), GracefulInterrupt().watching():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_are_left_alone():
    seen = []

    def run():
        with GracefulInterrupt().watching():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert seen == [before]
