from dataclasses import replace

import pytest

from shadowtune.config.serving import PolicyConfig, SimulationConfig
from shadowtune.errors import DataError
from shadowtune.serving.edge.confidence import Signals
from shadowtune.serving.simulation import routing
from shadowtune.serving.simulation.records import RecordedAnswer, RequestRecord
from shadowtune.serving.simulation.simulator import Simulator

CONFIG = SimulationConfig(rtt_ms=100, jitter_ms=0, bandwidth_mbit=8e9, price_per_1k_tokens=1, arrivals="closed:1")
SCORES = [(1, 1), (1, 0), (0, 1), (0, 0), (0, 1)]
"""Of edge and cloud."""


def answered(score, seconds):
    return RecordedAnswer("text", float(score), seconds, seconds / 2, 8, 2, [5, 2])


@pytest.fixture
def simulator():
    return Simulator([RequestRecord(answered(edge, 0.1), answered(cloud, 1.0)) for edge, cloud in SCORES], CONFIG)


def test_fixed_sides_have_their_own_accuracy(simulator):
    edge, cloud = simulator.run("always-edge", simulator.at_edge), simulator.run("always-cloud", simulator.at_cloud)
    assert (edge.policy, edge.accuracy, edge.deferral_rate, edge.cost) == ("always-edge", 0.4, 0, 0)
    assert (cloud.policy, cloud.accuracy, cloud.deferral_rate, cloud.cost) == ("always-cloud", 0.6, 1, 10)
    assert (edge.p50, cloud.p50) == (pytest.approx(0.1), pytest.approx(1.1))
    assert edge.scores == [1, 1, 0, 0, 0]


def test_routed_requests_alone_have_the_clouds_score_time_and_cost(simulator):
    result = routing.routed(simulator, "mine", [True, True, True, False, False], 0.5)
    assert (result.policy, result.threshold) == ("mine", 0.5)
    assert result.scores == [1, 0, 1, 0, 0]
    assert result.accuracy == pytest.approx(0.4)
    assert result.deferral_rate == pytest.approx(0.6)
    assert result.cost == pytest.approx(6)
    assert result.p50 == pytest.approx(1.2)
    assert result.seconds == pytest.approx(3 * 1.2 + 2 * 0.1)


def test_the_oracle_hands_over_what_the_cloud_alone_gets_right(simulator):
    result = routing.oracle(simulator)
    assert (result.accuracy, result.deferral_rate) == (0.8, 0.4)


def test_a_random_router_lies_on_the_line_between_the_sides(simulator):
    result = routing.random_router(simulator, 0.3)
    assert result.policy == "random 30%"
    assert result.accuracy == pytest.approx(0.7 * 0.4 + 0.3 * 0.6)
    assert result.cost == pytest.approx(3)
    assert result.deferral_rate == pytest.approx(0.3)


def test_a_random_router_waits_for_one_side_only(simulator):
    waited = []
    for rate in (0.0, 0.5, 1.0):
        result = routing.random_router(simulator, rate)
        sent = sum(uniform < rate for uniform in simulator.uniforms)
        assert result.seconds == pytest.approx(sent * 1.1 + (5 - sent) * 0.1)
        waited.append(result.seconds)
    assert waited[0] < waited[2]


def test_lora_in_the_cloud_answers_everything(simulator):
    records = [replace(record, lora=answered(1, 2.0)) for record in simulator.records]
    results = routing.baselines(Simulator(records, CONFIG))
    result = next(result for result in results if result.policy == "lora-cloud")
    assert (result.policy, result.accuracy, result.p50) == ("lora-cloud", 1, pytest.approx(2.1))


def test_verify_has_the_clouds_answers_sooner_where_both_agree(simulator):
    result = simulator.run("verify", simulator.verified)
    assert result.scores == simulator.run("always-cloud", simulator.at_cloud).scores
    assert result.p50 == pytest.approx(0.1 + 0.05 + 0.5 * 10 / 8 + 0.05)


def test_one_request_is_enough_for_every_strategy():
    simulator = Simulator([RequestRecord(answered(0, 0.1), answered(1, 1.0))], CONFIG)
    results = {result.policy: result.accuracy for result in routing.baselines(simulator)}
    everyone = ["always-edge", "always-cloud", "oracle", "verify"]
    assert [results[policy] for policy in everyone] == [0, 1, 1, 1]
    assert routing.oracle(simulator).p99 == pytest.approx(1.2)


def unsure_simulator():
    """Five requests whose edge is surer of each than of the one before it; the first answer is a tag."""
    edges = [
        replace(answered(right, 0.1), signals=Signals(0.1 * number, 0.5, 0.5, 0.5, 2))
        for number, right in enumerate((0, 0, 1, 1, 1))
    ]
    edges[0] = replace(edges[0], text="[REMOTE] please")
    return Simulator([RequestRecord(edge, answered(1, 1.0)) for edge in edges], CONFIG)


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
    result = routing.apply_policy(unsure_simulator(), "mine", policy)
    assert (result.policy, result.accuracy, result.deferral_rate) == ("mine", pytest.approx(accuracy), rate)


def test_always_cloud_and_verify_differ_in_who_begins():
    simulator = unsure_simulator()
    assert routing.apply_policy(simulator, "c", PolicyConfig("always-cloud")).p50 == pytest.approx(1.1)
    assert (
        routing.apply_policy(simulator, "v", PolicyConfig("verify")).p50
        == simulator.run("verify", simulator.verified).p50
    )


def test_every_threshold_goes_from_the_tags_alone_to_everything():
    curve = routing.threshold_sweep(unsure_simulator(), "logprob", PolicyConfig())
    assert [point.deferral_rate for point in curve] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert [point.accuracy for point in curve] == pytest.approx([0.8, 1, 1, 1, 1])
    for point in curve:
        policy = PolicyConfig(threshold=point.threshold)
        assert routing.apply_policy(unsure_simulator(), "logprob", policy) == point


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = routing.threshold_sweep(unsure_simulator(), "logprob", PolicyConfig(tag=None), count=4)
    assert (curve[0].deferral_rate, curve[-1].deferral_rate) == (0, 1)
    assert len(curve) <= 4


def test_areas_lie_between_chance_and_knowing_all():
    policies = {
        "sure": PolicyConfig(tag=None),
        "blind": PolicyConfig(tag=None, signal="margin"),
        "tag": PolicyConfig("tag"),
    }
    areas = routing.curve_areas(unsure_simulator(), policies)
    assert list(areas) == ["random", "sure", "blind", "oracle"]
    assert areas["random"] == areas["blind"] == pytest.approx(0.8)  # all margins are the same
    # accuracy rises from 0.6 to 1 over the first two of five requests, and stays
    assert areas["sure"] == areas["oracle"] == pytest.approx(0.2 * 0.7 + 0.2 * 0.9 + 0.6)


def test_lora_is_among_the_fixed_ones_only_where_every_request_has_its_answer(simulator):
    names = [result.policy for result in routing.baselines(simulator)]
    assert names[0] == "always-edge"
    assert "lora-cloud" not in names
    with_lora = [replace(record, lora=record.cloud) for record in simulator.records]
    assert "lora-cloud" in [result.policy for result in routing.baselines(Simulator(with_lora, CONFIG))]
    assert "lora-cloud" not in [
        r.policy for r in routing.baselines(Simulator([*with_lora, simulator.records[0]], CONFIG))
    ]


def token_simulator():
    """Edge answers of four tokens and an end, the cloud's of six; they part at the given token."""
    records = []
    for parts, sure in ((2, [0.9, 0.9, 0.2, 0.9, 0.9]), (0, [0.9, 0.9, 0.9, 0.3, 0.9]), (4, [0.9] * 5)):
        ids = [5, 6, 7, 8]
        edge = RecordedAnswer("edge", float(parts == 4), 0.5, 0.1, 8, 5, ids, token_confidences={"logprob": sure})
        cloud = RecordedAnswer("cloud", 1.0, 1.2, 0.2, 8, 6, [*ids[:parts], 9, 9, 9, 9][:5])
        records.append(RequestRecord(edge, cloud))
    return Simulator(records, CONFIG)


def test_a_deferral_in_mid_answer_costs_the_edge_its_part_and_the_cloud_the_rest():
    simulator = token_simulator()
    policy = PolicyConfig("token", threshold=0.5)
    result = routing.apply_policy(simulator, "mine", policy)
    assert result.scores == [1.0, 0.0, 1.0]  # continued, contradicted, of the edge
    assert result.deferral_rate == pytest.approx(2 / 3)
    continued, contradicted = simulator.mid_answer(0, 2), simulator.mid_answer(1, 3)
    assert [(step.server, pytest.approx(step.seconds)) for step in continued.trace.steps] == [
        ("edge", 0.1 + 2 * 0.1),
        ("cloud", 0.2 * 10 / 8 + 0.2 * 3),
    ]
    assert continued.cost == pytest.approx((8 + 6) / 1000)
    assert [step.server for step in contradicted.trace.steps] == ["edge", "cloud", "edge"]
    assert contradicted.trace.steps[2].seconds == pytest.approx(0.1 * 11 / 8 + 0.1)
    assert contradicted.cost == pytest.approx((8 + 3) / 1000)
    never = routing.apply_policy(simulator, "never", PolicyConfig("token", threshold=0.0))
    assert never.scores == simulator.run("edge", simulator.at_edge).scores


def test_with_a_cost_model_dear_prompts_are_not_deferred():
    simulator = token_simulator()
    dear = PolicyConfig("token", value=20.0, answer_tokens=8)  # 8 + 8 tokens: defers below 0.2
    assert routing.apply_policy(simulator, "mine", dear).deferral_rate == 0
    assert routing.apply_policy(simulator, "mine", replace(dear, value=32.0)).deferral_rate == pytest.approx(2 / 3)


def test_mid_answer_is_compared_with_whole_answers_at_no_less_accuracy():
    records = [
        replace(record, edge=replace(record.edge, signals=Signals(level, 0.5, 0.5, 0.5, 5)))
        for record, level in zip(token_simulator().records, (0.2, 0.1, 0.3), strict=True)
    ]
    match = routing.match_accuracy(Simulator(records, CONFIG), "mine", PolicyConfig("token", threshold=0.25))
    assert match.by_token.accuracy == match.by_answer.accuracy == pytest.approx(2 / 3)
    assert match.by_answer.deferral_rate == pytest.approx(1 / 3)
    assert "on whole answers by logprob: accuracy 66.7%" in str(match)


def test_old_recordings_have_no_tokens_and_say_so(simulator):
    with pytest.raises(DataError, match="delete them to record anew"):
        routing.apply_policy(simulator, "mine", PolicyConfig("token"))
