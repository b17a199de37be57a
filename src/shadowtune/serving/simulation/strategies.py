"""Who answers what: fixed sides, chance, all-knowing, a confidence with any threshold, and drafts that are checked."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shadowtune.config.policy import CurvePoint, PolicyConfig
from shadowtune.serving.edge.calibration import Measured, area, confidences, curve, oracle_area, random_area, thinned
from shadowtune.serving.edge.policies import is_tag, judge
from shadowtune.serving.simulation.world import Outcome, Result, World

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the requests that random routers send to the cloud."""
POINTS = 101
"""Thresholds that are replayed, of those that make a difference."""


def fixed(world: World) -> list[Result]:
    """Everything that needs no policy's settings; LoRA in the cloud where the records have its answers."""
    lora = [lora_in_the_cloud(world)] if all(record.lora for record in world.records) else []
    chance = [random_router(world, rate) for rate in RATES]
    return [always_edge(world), *chance, always_cloud(world), *lora, verify(world), oracle(world)]


def always_edge(world: World) -> Result:
    """Everything is answered at the edge."""
    return world.play("always-edge", world.at_edge)


def always_cloud(world: World) -> Result:
    """Everything goes to the cloud at once; the edge has no part in it."""
    return world.play("always-cloud", world.at_cloud)


def lora_in_the_cloud(world: World) -> Result:
    """Everything goes to the cloud, where the other model answers; all records must have its answers."""
    return world.play("lora-cloud", lambda number: world.at_cloud(number, world.records[number].lora))


def verify(world: World) -> Result:
    """The edge drafts every answer, the cloud checks it: the cloud's answers, sooner where both agree."""
    return world.play("verify", world.verified)


def oracle(world: World) -> Result:
    """What no router can know: only those are handed over that the cloud answers better than the edge."""
    return routed(world, "oracle", [record.cloud.score > record.edge.score for record in world.records])


def random_router(world: World, rate: float) -> Result:
    """A share of the requests, drawn without a look at them, goes to the cloud at once.

    Accuracy, cost and hand-over rate are what is to be expected of all draws; the latencies are those of one draw.
    """
    return world.play(f"random {rate:.0%}", lambda number: _by_chance(world, number, rate))


def routed(world: World, policy: str, hand_over: Sequence[bool], threshold: float | None = None) -> Result:
    """The edge answers everything; where ``hand_over`` says so, its answer is dropped and the cloud's is waited for."""
    return world.play(
        policy,
        lambda number: world.handed_over(number) if hand_over[number] else world.at_edge(number),
        threshold,
    )


def decided(world: World, name: str, policy: PolicyConfig) -> Result:
    """What a router with this policy does."""
    if policy.kind == "always-cloud":
        return world.play(name, world.at_cloud)
    if policy.kind == "verify":
        return world.play(name, world.verified)
    answers = [record.edge for record in world.records]
    hand_over = [judge(policy, answer.text, answer.signals).hand_over for answer in answers]
    return routed(world, name, hand_over, policy.threshold if policy.kind == "confidence" else None)


def every_threshold(world: World, name: str, policy: PolicyConfig, count: int = POINTS) -> list[Result]:
    """What a policy of kind "confidence" does with each threshold that makes a difference, or ``count`` of them."""
    points = _curve(world, policy)
    thresholds = [point.threshold for point in thinned(points, points[-1], count)]
    return [decided(world, name, replace(policy, threshold=threshold)) for threshold in thresholds]


def areas(world: World, policies: Mapping[str, PolicyConfig]) -> dict[str, float]:
    """How good routers are whatever their threshold: areas under accuracy over hand-over rate.

    Args:
        policies: those of kind "confidence" are measured, beside what chance and knowing all come to.
    """
    found = {name: area(_curve(world, policy)) for name, policy in policies.items() if policy.kind == "confidence"}
    rows = _measured(world, None)
    return {"random": random_area(rows), **found, "oracle": oracle_area(rows)}


def _curve(world: World, policy: PolicyConfig) -> list[CurvePoint]:
    rows = _measured(world, policy.tag)
    return curve(rows, confidences(rows, policy.signal, policy.weights))


def _measured(world: World, tag: str | None) -> list[Measured]:
    """Return the records as calibration reads them."""
    return [
        Measured(
            record.edge.signals,
            is_tag(record.edge.text, tag),
            record.edge.score,
            record.cloud.score,
            world.handed_over(number).cost,
        )
        for number, record in enumerate(world.records)
    ]


def _by_chance(world: World, number: int, rate: float) -> Outcome:
    edge, cloud = world.at_edge(number), world.at_cloud(number)
    return replace(
        cloud if world.chances[number] < rate else edge,
        score=(1 - rate) * edge.score + rate * cloud.score,
        cost=rate * cloud.cost,
        handed_over=rate,
    )
