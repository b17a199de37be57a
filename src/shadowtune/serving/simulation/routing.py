"""Routing policies in simulation: fixed sides, random, oracle, confidence with any threshold, verified drafts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shadowtune.config.serving import CurvePoint, PolicyConfig, SignalName
from shadowtune.errors import DataError
from shadowtune.serving.edge.confidence import decide, has_tag, token_threshold
from shadowtune.serving.edge.thresholds import (
    CalibrationExample,
    area,
    confidences,
    deferral_curve,
    oracle_area,
    random_area,
    thinned,
)
from shadowtune.serving.simulation.records import RecordedAnswer
from shadowtune.serving.simulation.simulator import RequestOutcome, SimulationResult, Simulator

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Deferral rates of the random routers."""
POINTS = 101
"""Most thresholds of a sweep."""


def baselines(simulator: Simulator) -> list[SimulationResult]:
    """Run all policies without settings; "lora-cloud" where all records have its answers."""
    results = [simulator.run("always-edge", simulator.at_edge)]
    results += [random_router(simulator, rate) for rate in RATES]
    results.append(simulator.run("always-cloud", simulator.at_cloud))
    if all(record.lora for record in simulator.records):
        results.append(
            simulator.run("lora-cloud", lambda number: simulator.at_cloud(number, simulator.records[number].lora))
        )
    return [*results, simulator.run("verify", simulator.verified), oracle(simulator)]


def oracle(simulator: Simulator) -> SimulationResult:
    """Defer only what the cloud answers better than the edge, which no router can know."""
    return routed(simulator, "oracle", [record.cloud.score > record.edge.score for record in simulator.records])


def random_router(simulator: Simulator, rate: float) -> SimulationResult:
    """Send a share of the requests, drawn independently of their content, straight to the cloud.

    Accuracy, cost and deferral rate are expected values over all draws; the latencies are those of one draw.
    """

    def outcome(number: int) -> RequestOutcome:
        edge, cloud = simulator.at_edge(number), simulator.at_cloud(number)
        return replace(
            cloud if simulator.uniforms[number] < rate else edge,
            score=(1 - rate) * edge.score + rate * cloud.score,
            cost=rate * cloud.cost,
            deferred=rate,
            decoded=rate * cloud.decoded,
        )

    return simulator.run(f"random {rate:.0%}", outcome)


def routed(
    simulator: Simulator, policy: str, defer: Sequence[bool], threshold: float | None = None
) -> SimulationResult:
    """Let the edge answer everything, and the cloud again where ``defer`` is true."""
    return simulator.run(
        policy,
        lambda number: simulator.deferred(number) if defer[number] else simulator.at_edge(number, streamed=False),
        threshold,
    )


def apply_policy(simulator: Simulator, name: str, policy: PolicyConfig) -> SimulationResult:
    """Route as ``Router`` does with this policy."""
    if policy.kind == "always-cloud":
        return simulator.run(name, simulator.at_cloud)
    if policy.kind == "always-edge":
        return simulator.run(name, simulator.at_edge)
    if policy.kind == "verify":
        return simulator.run(name, simulator.verified)
    if policy.kind == "token":
        return _by_token(simulator, name, policy)
    answers = [record.edge for record in simulator.records]
    defer = [decide(policy, answer.text, answer.signals).defer for answer in answers]
    return routed(simulator, name, defer, policy.threshold if policy.kind == "confidence" else None)


def _by_token(simulator: Simulator, name: str, policy: PolicyConfig) -> SimulationResult:
    """Defer each answer at its first unsure token."""

    def outcome(number: int) -> RequestOutcome:
        edge = simulator.records[number].edge
        threshold = token_threshold(policy, edge.prompt_tokens)
        sure = _token_confidences(edge, policy)
        index = next((index for index, level in enumerate(sure) if level < threshold), None)
        return simulator.at_edge(number) if index is None else simulator.mid_answer(number, index)

    return simulator.run(name, outcome, policy.threshold if policy.value is None else None)


def _token_confidences(answer: RecordedAnswer, policy: PolicyConfig) -> list[float]:
    try:
        return answer.token_confidences[policy.signal]
    except KeyError:
        raise DataError(
            f"the recorded answers of the edge have no confidence of tokens by {policy.signal}; delete them to record "
            "anew, by an edge that has it"
        ) from None


@dataclass(frozen=True)
class AccuracyMatch:
    """Deferral in mid-answer beside whole-answer routing that is at least as accurate; ``str`` gives a sentence."""

    policy: str
    signal: SignalName
    by_token: SimulationResult
    by_answer: SimulationResult | None
    """The cheapest threshold on whole answers; None if none is as accurate."""

    def __str__(self) -> str:
        own, other = self.by_token, self.by_answer
        begin = f"{self.policy}, in mid-answer: {_measures(own)}"
        if other is None:
            return f"{begin}; no threshold on whole answers by {self.signal} is as accurate"
        return f"{begin}; on whole answers by {self.signal}: {_measures(other)}"


def _measures(result: SimulationResult) -> str:
    return (
        f"accuracy {result.accuracy:.1%}, cost {result.cost:.4g}, {result.cloud_tokens:.3g} tokens generated by the "
        f"cloud, p50 {result.p50:.3g} s, first token {result.first_p50:.3g} s"
    )


def match_accuracy(simulator: Simulator, name: str, policy: PolicyConfig) -> AccuracyMatch:
    """Compare a policy of kind "token" with whole-answer routing by the same signal at no less accuracy."""
    own = apply_policy(simulator, name, policy)
    whole = PolicyConfig(signal=policy.signal, tag=policy.tag, prices=policy.prices)
    able = [each for each in threshold_sweep(simulator, name, whole) if each.accuracy >= own.accuracy - 1e-12]
    best = min(able, key=lambda each: (each.cost, each.p50), default=None)
    return AccuracyMatch(name, policy.signal, own, best)


def threshold_sweep(
    simulator: Simulator, name: str, policy: PolicyConfig, count: int = POINTS
) -> list[SimulationResult]:
    """Run a policy of kind "confidence" with each threshold that makes a difference, or ``count`` of them."""
    points = _curve(simulator, policy)
    thresholds = [point.threshold for point in thinned(points, points[-1], count)]
    return [apply_policy(simulator, name, replace(policy, threshold=threshold)) for threshold in thresholds]


def curve_areas(simulator: Simulator, policies: Mapping[str, PolicyConfig]) -> dict[str, float]:
    """Return the area under accuracy over deferral rate of each "confidence" policy, of random and of the oracle."""
    areas = {name: area(_curve(simulator, policy)) for name, policy in policies.items() if policy.kind == "confidence"}
    examples = _examples(simulator, None)
    return {"random": random_area(examples), **areas, "oracle": oracle_area(examples)}


def _curve(simulator: Simulator, policy: PolicyConfig) -> list[CurvePoint]:
    examples = _examples(simulator, policy.tag)
    return deferral_curve(examples, confidences(examples, policy.signal, policy.weights))


def _examples(simulator: Simulator, tag: str | None) -> list[CalibrationExample]:
    return [
        CalibrationExample(
            record.edge.signals,
            has_tag(record.edge.text, tag),
            record.edge.score,
            record.cloud.score,
            simulator.deferred(number).cost,
        )
        for number, record in enumerate(simulator.records)
    ]
