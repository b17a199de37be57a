from dataclasses import replace

import pytest

from shadowtune.config.policy import PolicyConfig
from shadowtune.config.simulation import SimulationConfig
from shadowtune.serving.edge.signals import Signals
from shadowtune.serving.simulation import strategies
from shadowtune.serving.simulation.records import Answered, Record
from shadowtune.serving.simulation.world import World

CONFIG = SimulationConfig(rtt_ms=100, jitter_ms=0, bandwidth_mbit=8e9, price_per_1k_tokens=1, arrivals="closed:1")
SCORES = [(1, 1), (1, 0), (0, 1), (0, 0), (0, 1)]
"""Of edge and cloud."""


def answered(score, seconds):
    return Answered("text", float(score), seconds, seconds / 2, 8, 2, [5, 2])


@pytest.fixture
def world():
    return World([Record(answered(edge, 0.1), answered(cloud, 1.0)) for edge, cloud in SCORES], CONFIG)


def test_fixed_sides_have_their_own_accuracy(world):
    edge, cloud = strategies.always_edge(world), strategies.always_cloud(world)
    assert (edge.policy, edge.accuracy, edge.hand_over_rate, edge.cost) == ("always-edge", 0.4, 0, 0)
    assert (cloud.policy, cloud.accuracy, cloud.hand_over_rate, cloud.cost) == ("always-cloud", 0.6, 1, 10)
    assert (edge.p50, cloud.p50) == (pytest.approx(0.1), pytest.approx(1.1))
    assert edge.scores == [1, 1, 0, 0, 0]


def test_routed_requests_alone_have_the_clouds_score_time_and_cost(world):
    result = strategies.routed(world, "mine", [True, True, True, False, False], 0.5)
    assert (result.policy, result.threshold) == ("mine", 0.5)
    assert result.scores == [1, 0, 1, 0, 0]
    assert result.accuracy == pytest.approx(0.4)
    assert result.hand_over_rate == pytest.approx(0.6)
    assert result.cost == pytest.approx(6)
    assert result.p50 == pytest.approx(1.2)
    assert result.seconds == pytest.approx(3 * 1.2 + 2 * 0.1)


def test_the_oracle_hands_over_what_the_cloud_alone_gets_right(world):
    result = strategies.oracle(world)
    assert (result.accuracy, result.hand_over_rate) == (0.8, 0.4)


def test_a_random_router_lies_on_the_line_between_the_sides(world):
    result = strategies.random_router(world, 0.3)
    assert result.policy == "random 30%"
    assert result.accuracy == pytest.approx(0.7 * 0.4 + 0.3 * 0.6)
    assert result.cost == pytest.approx(3)
    assert result.hand_over_rate == pytest.approx(0.3)


def test_a_random_router_waits_for_one_side_only(world):
    waited = []
    for rate in (0.0, 0.5, 1.0):
        result = strategies.random_router(world, rate)
        sent = sum(chance < rate for chance in world.chances)
        assert result.seconds == pytest.approx(sent * 1.1 + (5 - sent) * 0.1)
        waited.append(result.seconds)
    assert waited[0] < waited[2]


def test_lora_in_the_cloud_answers_everything(world):
    records = [replace(record, lora=answered(1, 2.0)) for record in world.records]
    result = strategies.lora_in_the_cloud(World(records, CONFIG))
    assert (result.policy, result.accuracy, result.p50) == ("lora-cloud", 1, pytest.approx(2.1))


def test_verify_has_the_clouds_answers_sooner_where_both_agree(world):
    result = strategies.verify(world)
    assert result.scores == strategies.always_cloud(world).scores
    assert result.p50 == pytest.approx(0.1 + 0.05 + 0.5 * 10 / 8 + 0.05)


def test_one_request_is_enough_for_every_strategy():
    world = World([Record(answered(0, 0.1), answered(1, 1.0))], CONFIG)
    everyone = [strategies.always_edge, strategies.always_cloud, strategies.oracle, strategies.verify]
    assert [strategy(world).accuracy for strategy in everyone] == [0, 1, 1, 1]
    assert strategies.oracle(world).p99 == pytest.approx(1.2)


def unsure_world():
    """Five requests whose edge is surer of each than of the one before it; the first answer is a tag."""
    edges = [
        replace(answered(right, 0.1), signals=Signals(0.1 * number, 0.5, 0.5, 0.5, 2))
        for number, right in enumerate((0, 0, 1, 1, 1))
    ]
    edges[0] = replace(edges[0], text="[REMOTE] please")
    return World([Record(edge, answered(1, 1.0)) for edge in edges], CONFIG)


@pytest.mark.parametrize(
    ("policy", "accuracy", "rate"),
    [
        (PolicyConfig("always-edge"), 0.6, 0),
        (PolicyConfig("always-cloud"), 1, 1),
        (PolicyConfig("tag"), 0.8, 0.2),
        (PolicyConfig("confidence", threshold=0.2), 1, 0.4),
        (PolicyConfig("confidence", threshold=0.2, tag=None), 1, 0.4),
        (PolicyConfig("confidence", threshold=0.1, tag=None), 0.8, 0.2),
        (PolicyConfig("confidence", threshold=0.5, signal="margin"), 0.8, 0.2),
        (PolicyConfig("confidence", threshold=0.6, signal="margin"), 1, 1),
        (PolicyConfig("verify"), 1, 1),
    ],
)
def test_a_policy_hands_over_as_the_router_would(policy, accuracy, rate):
    result = strategies.decided(unsure_world(), "mine", policy)
    assert (result.policy, result.accuracy, result.hand_over_rate) == ("mine", pytest.approx(accuracy), rate)


def test_always_cloud_and_verify_differ_in_who_begins():
    world = unsure_world()
    assert strategies.decided(world, "c", PolicyConfig("always-cloud")).p50 == pytest.approx(1.1)
    assert strategies.decided(world, "v", PolicyConfig("verify")).p50 == strategies.verify(world).p50


def test_every_threshold_goes_from_the_tags_alone_to_everything():
    curve = strategies.every_threshold(unsure_world(), "logprob", PolicyConfig())
    assert [point.hand_over_rate for point in curve] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert [point.accuracy for point in curve] == pytest.approx([0.8, 1, 1, 1, 1])
    for point in curve:
        policy = PolicyConfig(threshold=point.threshold)
        assert strategies.decided(unsure_world(), "logprob", policy) == point


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = strategies.every_threshold(unsure_world(), "logprob", PolicyConfig(tag=None), count=4)
    assert (curve[0].hand_over_rate, curve[-1].hand_over_rate) == (0, 1)
    assert len(curve) <= 4


def test_areas_lie_between_chance_and_knowing_all():
    policies = {
        "sure": PolicyConfig(tag=None),
        "blind": PolicyConfig(tag=None, signal="margin"),
        "tag": PolicyConfig("tag"),
    }
    areas = strategies.areas(unsure_world(), policies)
    assert list(areas) == ["random", "sure", "blind", "oracle"]
    assert areas["random"] == areas["blind"] == pytest.approx(0.8)  # all margins are the same
    # accuracy rises from 0.6 to 1 over the first two of five requests, and stays
    assert areas["sure"] == areas["oracle"] == pytest.approx(0.2 * 0.7 + 0.2 * 0.9 + 0.6)


def test_lora_is_among_the_fixed_ones_only_where_every_request_has_its_answer(world):
    names = [result.policy for result in strategies.fixed(world)]
    assert names[0] == "always-edge"
    assert "lora-cloud" not in names
    with_lora = [replace(record, lora=record.cloud) for record in world.records]
    assert "lora-cloud" in [result.policy for result in strategies.fixed(World(with_lora, CONFIG))]
    assert "lora-cloud" not in [r.policy for r in strategies.fixed(World([*with_lora, world.records[0]], CONFIG))]
