"""Requests on their way: first come, first served, at one server a side, with travel in between."""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shadowtune.config.simulation import Arrivals

Side = Literal["edge", "cloud"]


@dataclass(frozen=True)
class Stage:
    """One server that a request needs."""

    side: Side
    seconds: float
    """How long the server is busy with it."""
    travel: float = 0.0
    """Seconds on the way there."""


@dataclass(frozen=True)
class Journey:
    """All that happens to a request between its arrival and its answer."""

    stages: tuple[Stage, ...]
    home: float = 0.0
    """Seconds on the way back."""


@dataclass(frozen=True)
class Timing:
    """What the requests of one replay waited."""

    latencies: list[float]
    """Seconds from a request's arrival to its whole answer, in the order of the requests."""
    seconds: float
    """From the first arrival to the last answer."""


def replay(journeys: Sequence[Journey], arrivals: Arrivals, seed: int = 0) -> Timing:
    """Send requests on their journeys, in their order.

    Args:
        journeys: of the requests, at least one.
        arrivals: when they come.
        seed: of the times between arrivals; the same seed gives the same times whatever the journeys are.
    """
    coming = _times(len(journeys), arrivals, seed)
    waiting = list(range(len(journeys) - 1, len(coming) - 1, -1))
    arrived = dict(enumerate(coming))
    ended = [0.0] * len(journeys)
    free: dict[Side, float] = {"edge": 0.0, "cloud": 0.0}
    # (time, request, stage it has reached), so that ties are served in the order of the requests
    events = [_step(journeys[request], request, 0, time) for request, time in arrived.items()]
    heapq.heapify(events)
    while events:
        time, request, number = heapq.heappop(events)
        journey = journeys[request]
        if number < len(journey.stages):
            stage = journey.stages[number]
            free[stage.side] = max(time, free[stage.side]) + stage.seconds
            heapq.heappush(events, _step(journey, request, number + 1, free[stage.side]))
            continue
        ended[request] = time
        if waiting:
            following = waiting.pop()
            arrived[following] = time
            heapq.heappush(events, _step(journeys[following], following, 0, time))
    latencies = [end - arrived[request] for request, end in enumerate(ended)]
    return Timing(latencies, max(ended) - coming[0])


def _step(journey: Journey, request: int, number: int, left: float) -> tuple[float, int, int]:
    """The event of reaching a stage, or home, having left the place before it at ``left``."""
    travel = journey.stages[number].travel if number < len(journey.stages) else journey.home
    return left + travel, request, number


def _times(count: int, arrivals: Arrivals, seed: int) -> list[float]:
    """When requests come by themselves: all of them or, where clients wait, the first of each client."""
    if arrivals.rate is None:
        return [0.0] * min(count, arrivals.clients)
    chance, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(arrivals.rate)
        times.append(now)
    return times
