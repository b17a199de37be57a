import random

import pytest

from shadowtune.config.serving import Arrivals
from shadowtune.serving.simulation.simulator import RequestTrace, ServiceStep, replay

ONE = Arrivals(clients=1)


def edge(seconds):
    return RequestTrace((ServiceStep("edge", seconds),))


def cloud(seconds, latency=0.5, return_latency=0.25):
    return RequestTrace((ServiceStep("cloud", seconds, latency),), return_latency)


def test_one_client_waits_for_each_answer_before_it_asks_again():
    timing = replay([edge(1), cloud(2), edge(3)], ONE)
    assert timing.latencies == [1, 2.75, 3]
    assert timing.seconds == 6.75


def test_two_clients_share_a_server_first_come_first_served():
    timing = replay([edge(1), edge(2), edge(4)], Arrivals(clients=2))
    assert timing.latencies == [1, 3, 6]  # the third comes at 1, when the first is done, and waits for the second
    assert timing.seconds == 7


def test_the_two_sides_work_at_the_same_time():
    timing = replay([edge(5), cloud(5)], Arrivals(clients=2))
    assert timing.latencies == [5, 5.75]
    assert timing.seconds == 5.75


def test_a_deferred_request_leaves_the_edge_free_and_queues_in_the_cloud():
    both = RequestTrace((ServiceStep("edge", 1), ServiceStep("cloud", 4, 0.5)), 0.5)
    timing = replay([both, both], Arrivals(clients=2))
    # the second leaves the edge at 2, reaches the cloud at 2.5, which is busy until 5.5, and has its answer at 10
    assert timing.latencies == [6, 10]


def test_who_reaches_the_cloud_first_is_served_first_whatever_the_order_of_asking():
    timing = replay([cloud(1, latency=3), cloud(1, latency=0)], Arrivals(clients=2))
    assert timing.latencies == [4.25, 1.25]


def test_more_clients_than_requests_are_no_more_than_those():
    assert replay([edge(1)], Arrivals(clients=9)).latencies == [1]


def test_poisson_arrivals_are_those_of_the_seed_and_their_mean_gap_is_that_of_the_rate():
    count, rate = 4000, 5.0
    timing = replay([edge(0)] * count, Arrivals(rate=rate), seed=3)
    assert timing.latencies == [0] * count
    assert timing.seconds == pytest.approx(count / rate, rel=0.05)
    assert timing == replay([edge(0)] * count, Arrivals(rate=rate), seed=3)
    assert timing.seconds != replay([edge(0)] * count, Arrivals(rate=rate), seed=4).seconds


def test_poisson_arrivals_wait_as_queueing_theory_says():
    # M/D/1: with load 0.5 the mean time in the queue is load / (2 (1 - load)) of the service time
    timing = replay([edge(0.5)] * 40_000, Arrivals(rate=1.0), seed=1)
    assert sum(timing.latencies) / 40_000 == pytest.approx(0.5 + 0.25, rel=0.05)


def test_no_server_does_two_things_at_once_and_nothing_is_faster_than_alone():
    rng = random.Random(5)
    traces = [
        RequestTrace(
            (ServiceStep("edge", rng.random()), ServiceStep("cloud", rng.random(), rng.random())), rng.random()
        )
        for _ in range(200)
    ]
    timing = replay(traces, Arrivals(rate=3.0), seed=2)
    for trace, latency in zip(traces, timing.latencies, strict=True):
        alone = sum(step.latency + step.seconds for step in trace.steps) + trace.return_latency
        assert latency >= alone - 1e-9
    assert timing.seconds >= sum(trace.steps[1].seconds for trace in traces)
