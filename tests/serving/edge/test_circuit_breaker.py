import pytest

from shadowtune.serving.edge.openai_api import RemoteError
from shadowtune.serving.edge.remote import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def broken(failures=2, cool_down=10):
    clock = Clock()
    breaker = CircuitBreaker(failures, cool_down, clock)
    for _ in range(failures):
        breaker.admit()
        breaker.fail()
    return breaker, clock


def refused(breaker):
    with pytest.raises(RemoteError) as caught:
        breaker.admit()
    return caught.value


def test_it_opens_after_so_many_failures_in_a_row():
    breaker = CircuitBreaker(2, 10, Clock())
    breaker.fail()
    breaker.succeed()
    breaker.fail()
    assert breaker.state == "closed"
    breaker.fail()
    assert breaker.state == "open"
    assert (refused(breaker).reason, refused(breaker).status) == ("cloud circuit open", 503)


def test_after_the_cool_down_one_request_tries():
    breaker, clock = broken()
    clock.now = 10
    assert breaker.state == "half-open"
    breaker.admit()
    refused(breaker)
    breaker.succeed()
    assert breaker.state == "closed"
    breaker.admit()
    breaker.admit()


def test_a_trial_that_fails_begins_the_cool_down_anew():
    breaker, clock = broken()
    clock.now = 10
    breaker.admit()
    breaker.fail()
    clock.now = 19
    refused(breaker)
    clock.now = 20
    breaker.admit()


def test_a_trial_that_was_given_up_leaves_room_for_another():
    breaker, clock = broken()
    clock.now = 10
    breaker.admit()
    breaker.release()
    breaker.admit()
    refused(breaker)
