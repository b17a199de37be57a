import random

import pytest

from shadowtune.config.serving import PolicyConfig, Prices, SimulationConfig
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.serving.edge.thresholds import CalibrationTarget
from shadowtune.serving.edge.token_calibration import TokenExample, calibrate_tokens, token_curve, token_levels
from shadowtune.serving.requests import Usage
from shadowtune.serving.simulation import routing
from shadowtune.serving.simulation.records import RecordedAnswer, RequestRecord
from shadowtune.serving.simulation.simulator import Simulator, common_prefix

PRICES = Prices(prompt=0.001, completion=0.001)
"""Those of a simulation with the default price of 1,000 tokens."""


def records(count=80, seed=0):
    """Answers of five tokens; where the edge is wrong, the first wrong token is mostly unsure."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        ids = [draw.randrange(9) for _ in range(5)]
        parts = draw.choice([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])
        cloud = [*ids[:parts], *(20 + each for each in ids[parts:])]
        sure = [draw.uniform(0.5, 1.0) for _ in range(6)]
        if parts < 5:
            sure[parts] = draw.uniform(0.1, 0.6)
        own = {"logprob": sure, "margin": [draw.random() for _ in range(6)], "entropy": sure}
        edge = RecordedAnswer("a", float(parts == 5), 0.5, 0.1, draw.randrange(4, 40), 6, ids, token_confidences=own)
        found.append(RequestRecord(edge, RecordedAnswer("b", 1.0, 1.0, 0.2, 9, 6, cloud)))
    return found


def examples(given):
    return [
        TokenExample(
            each.edge.token_confidences,
            each.edge.score,
            each.cloud.score,
            common_prefix(each),
            len(each.edge.tokens),
            len(each.cloud.tokens),
            each.edge.prompt_tokens,
            Usage(each.cloud.prompt_tokens, each.cloud.completion_tokens),
        )
        for each in given
    ]


def test_every_point_of_the_curve_is_what_the_simulator_finds():
    given = records(12)
    simulator = Simulator(given, SimulationConfig())
    model = PolicyConfig("token", prices=PRICES)
    rows = examples(given)
    points = token_curve(rows, token_levels(rows, "logprob", model, False), PRICES)
    assert len(points) > 12
    for point in points:
        result = routing.apply_policy(simulator, "x", PolicyConfig("token", threshold=point.threshold))
        found = (result.accuracy, result.deferral_rate, result.cost / 1000)
        assert found == pytest.approx((point.accuracy, point.deferral_rate, point.cost))


def test_every_point_of_the_cost_model_is_what_the_simulator_finds():
    given = records(12)
    simulator = Simulator(given, SimulationConfig())
    model = PolicyConfig("token", prices=PRICES, answer_tokens=6)
    rows = examples(given)
    for point in token_curve(rows, token_levels(rows, "logprob", model, True), PRICES)[1:]:
        policy = PolicyConfig("token", prices=PRICES, answer_tokens=6, value=point.threshold)
        result = routing.apply_policy(simulator, "x", policy)
        assert (result.accuracy, result.deferral_rate) == pytest.approx((point.accuracy, point.deferral_rate))


@pytest.mark.parametrize("by_value", [False, True])
def test_the_policy_holds_on_the_other_half(by_value):
    given = records(200)
    done = calibrate_tokens(examples(given), CalibrationTarget("accuracy", 0.8), "auto", PRICES, by_value)
    assert done.policy.kind == "token" and (done.policy.value is not None) == by_value
    assert done.policy.signal in ("logprob", "entropy")  # margin is noise
    assert done.promised.accuracy >= 0.8 and done.found.accuracy == pytest.approx(done.promised.accuracy, abs=0.1)
    replayed = routing.apply_policy(Simulator(given, SimulationConfig()), "x", done.policy)
    assert replayed.accuracy == pytest.approx((done.promised.accuracy + done.found.accuracy) / 2)


def test_a_guaranteed_loss_is_kept():
    done = calibrate_tokens(examples(records(400)), CalibrationTarget("accuracy-loss", 0.2), "logprob", PRICES)
    assert sum(done.scores) / len(done.scores) >= 0.8
    assert done.found is None and 0 < done.promised.deferral_rate < 1


def test_what_cannot_be_calibrated_is_refused():
    rows = examples(records(60))
    with pytest.raises(ConfigError, match="no signal agreement of this edge"):
        calibrate_tokens(rows, CalibrationTarget("accuracy", 0.8), "agreement", PRICES)
    with pytest.raises(ShadowtuneError, match="would suffice"):
        calibrate_tokens(rows, CalibrationTarget("accuracy-loss", 0.01), "logprob", PRICES)
    right = [each for each in rows if not each.cloud_helps]
    with pytest.raises(ShadowtuneError, match=r"better in 0 of .* would suffice"):
        calibrate_tokens(right, CalibrationTarget("accuracy", 0.8), "auto", PRICES)
