import pytest

from shadowtune.config.serving import SimulationConfig
from shadowtune.errors import DataError
from shadowtune.serving.simulation.records import RecordedAnswer, RequestRecord
from shadowtune.serving.simulation.simulator import HEADER_BYTES, Simulator, common_prefix

STILL = SimulationConfig(rtt_ms=100, jitter_ms=0, bandwidth_mbit=8e9, price_per_1k_tokens=2, arrivals="closed:1")
"""A network without luck: 50 ms each way, however much is sent."""


def answered(score=1.0, seconds=1.0, first=0.4, prompt=20, tokens=(7, 8, 2), text="yes"):
    return RecordedAnswer(text, score, seconds, first, prompt, len(tokens), list(tokens))


def record(edge=None, cloud=None, **others):
    return RequestRecord(edge or answered(seconds=0.1), cloud or answered(), **others)


def test_an_answer_of_the_edge_costs_its_own_time_and_nothing_else():
    simulator = Simulator([record(answered(score=0.5, seconds=0.25))], STILL)
    result = simulator.run("edge", simulator.at_edge)
    assert (result.cost, result.deferral_rate, result.accuracy) == (0, 0, 0.5)
    assert (result.p50, result.p90, result.p99, result.seconds) == (0.25, 0.25, 0.25, 0.25)


def test_an_answer_of_the_cloud_takes_the_way_there_and_back_and_is_paid_by_the_token():
    simulator = Simulator([record(cloud=answered(prompt=20, tokens=(7, 8, 2, 4, 5)))], STILL)
    result = simulator.run("cloud", simulator.at_cloud)
    assert result.p50 == pytest.approx(0.05 + 1.0 + 0.05)
    assert result.cost == pytest.approx(1000 * 25 / 1000 * 2)
    assert result.deferral_rate == 1


def test_a_deferred_request_takes_the_time_of_both_and_has_the_answer_of_the_cloud():
    simulator = Simulator([record(answered(0.0, 0.3), answered(0.75, 1.0))], STILL)
    result = simulator.run("both", simulator.deferred)
    assert result.p50 == pytest.approx(0.3 + 0.05 + 1.0 + 0.05)
    assert (result.accuracy, result.cost) == (0.75, pytest.approx(46))


def test_another_answer_stands_in_the_clouds_place():
    simulator = Simulator([record(lora=answered(0.25, 3.0, prompt=10, tokens=(1,)))], STILL)
    result = simulator.run("lora", lambda number: simulator.at_cloud(number, simulator.records[number].lora))
    assert (result.accuracy, result.p50, result.cost) == (0.25, pytest.approx(3.1), pytest.approx(22))


@pytest.mark.parametrize(
    ("edge", "cloud", "stand", "tokens_left"),
    [
        ((7, 8, 2), (7, 8, 2), 3, 0),  # all of it: one pass, no token more
        ((7, 8, 9, 2), (7, 8, 2), 2, 0),  # the pass itself gives the token after those that stand
        ((9, 8, 2), (7, 8, 2), 0, 2),
        ((7,), (7, 8, 9, 2), 1, 2),
        ((), (7, 8), 0, 1),
    ],
)
def test_a_checked_draft_costs_one_pass_and_the_tokens_that_it_did_not_foresee(edge, cloud, stand, tokens_left):
    both = record(answered(seconds=0.1, tokens=edge), answered(seconds=1.0, first=0.4, prompt=20, tokens=cloud))
    simulator = Simulator([both], STILL)
    assert common_prefix(both) == stand
    result = simulator.run("verify", simulator.verified)
    each = 0.6 / (len(cloud) - 1)
    reading = 0.4 * (20 + len(edge)) / 20
    assert result.p50 == pytest.approx(0.1 + 0.05 + reading + tokens_left * each + 0.05)
    assert result.cost == pytest.approx(2 * (20 + len(cloud) + len(edge) - stand))
    assert (result.accuracy, result.deferral_rate) == (1, 1)


def test_speeds_divide_each_sides_seconds():
    fast = SimulationConfig(rtt_ms=0, jitter_ms=0, bandwidth_mbit=8e9, edge_speed=2, cloud_speed=4, arrivals="closed:1")
    simulator = Simulator([record(answered(seconds=1.0), answered(seconds=1.0))], fast)
    assert simulator.run("both", simulator.deferred).p50 == pytest.approx(0.5 + 0.25)


def test_what_is_sent_takes_as_long_as_the_bandwidth_says():
    narrow = SimulationConfig(rtt_ms=0, jitter_ms=0, bandwidth_mbit=0.008, arrivals="closed:1")  # 1,000 bytes a second
    simulator = Simulator([record(cloud=answered(seconds=0, text="é" * 250), request_bytes=2000)], narrow)
    assert simulator.run("cloud", simulator.at_cloud).p50 == pytest.approx(
        (HEADER_BYTES + 2000 + HEADER_BYTES + 500) / 1000
    )


def test_jitter_spreads_round_trips_evenly_around_their_mean_and_never_makes_them_negative():
    shaken = SimulationConfig(rtt_ms=60, jitter_ms=20, bandwidth_mbit=8e9, arrivals="closed:1")
    simulator = Simulator([record(cloud=answered(seconds=0))] * 2000, shaken)
    trips = [simulator.at_cloud(number).trace for number in range(2000)]
    times = [trace.steps[0].latency + trace.return_latency for trace in trips]
    assert 0.04 <= min(times) < 0.045
    assert 0.075 < max(times) <= 0.08
    assert sum(times) / 2000 == pytest.approx(0.06, abs=0.0005)
    near = SimulationConfig(rtt_ms=1, jitter_ms=50, bandwidth_mbit=8e9, arrivals="closed:1")
    simulator = Simulator([record()] * 100, near)
    assert min(simulator.at_cloud(number).trace.return_latency for number in range(100)) >= 0


def test_percentiles_are_those_of_known_latencies():
    simulator = Simulator([record(answered(seconds=float(second))) for second in range(101)], STILL)
    result = simulator.run("edge", simulator.at_edge)
    assert (result.p50, result.p90, result.p99) == (50, 90, 99)
    assert result.seconds == sum(range(101))


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    records = [record(answered(seconds=0.1 * (number % 3))) for number in range(50)]
    results = []
    for seed in (1, 1, 2):
        simulator = Simulator(records, SimulationConfig(arrivals="poisson:3", seed=seed))
        results.append(simulator.run("both", simulator.deferred))
    assert results[0] == results[1]
    assert results[0].p90 != results[2].p90


def test_without_requests_there_is_nothing_to_replay():
    with pytest.raises(DataError, match="no requests"):
        Simulator([], STILL)


@pytest.mark.parametrize(
    ("arrivals", "speed", "sides"),
    [("poisson:0.9", 1, []), ("poisson:1.1", 1, ["cloud"]), ("poisson:20", 1, ["edge", "cloud"]), ("closed:9", 1, []),
     ("poisson:1.1", 2, [])],
)  # fmt: skip
def test_a_side_is_overloaded_if_requests_come_faster_than_it_can_answer(arrivals, speed, sides):
    config = SimulationConfig(arrivals=arrivals, cloud_speed=speed)
    assert Simulator([record(answered(seconds=0.1), answered(seconds=1.0))], config).overloaded() == sides


def test_the_first_token_comes_as_the_route_allows():
    both = record(answered(seconds=0.3, first=0.1), answered(seconds=1.0, first=0.4))
    simulator = Simulator([both], STILL)
    expected = {
        "streamed": (simulator.at_edge, 0.1),
        "decided about": (lambda number: simulator.at_edge(number, streamed=False), 0.3),
        "cloud": (simulator.at_cloud, 0.05 + 0.4 + 0.05),
        "deferred": (simulator.deferred, 0.3 + 0.05 + 0.4 + 0.05),
        "in mid-answer": (lambda number: simulator.mid_answer(number, 2), 0.1),
        "at the first token": (lambda number: simulator.mid_answer(number, 0), 0.1 + 0.05 + 0.4 + 0.05),
    }
    for name, (outcome, seconds) in expected.items():
        result = simulator.run(name, outcome)
        assert result.first_p50 == pytest.approx(seconds), name
        assert result.first_p50 <= result.p50
