"""What a decision about a request costs: in right answers, in money, and on the way that it takes."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from shadowtune.config.policy import Prices
from shadowtune.config.simulation import Arrivals, SimulationConfig
from shadowtune.errors import DataError
from shadowtune.serving.edge.router import cost
from shadowtune.serving.requests import Usage
from shadowtune.serving.simulation.queues import Journey, Side, Stage, replay
from shadowtune.serving.simulation.records import Answered, Record

HEADER_BYTES = 1000
"""Sent along with each request and each answer, over a connection that is open already."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    score: float
    cost: float
    """In units of ``SimulationConfig.price_per_1k_tokens``."""
    handed_over: float
    """1 if the cloud was asked, 0 if not; a share, where a chance decides."""
    journey: Journey


@dataclass(frozen=True)
class Result:
    """What became of all requests under one policy."""

    policy: str
    accuracy: float
    """Mean of the scores."""
    hand_over_rate: float
    """Share of the requests that the cloud was asked."""
    cost: float
    """Of a thousand requests."""
    p50: float
    """Median latency in seconds, from a request's arrival to its whole answer."""
    p90: float
    p99: float
    seconds: float
    """From the first arrival to the last answer."""
    threshold: float | None = None
    """Of the confidence below which requests were handed over."""
    scores: list[float] = field(repr=False, default_factory=list)
    """Of each request."""


class World:
    """Recorded answers, and a network between the two sides.

    Every policy meets the same luck: a request has its jitter and its arrival, whoever answers it.

    Args:
        records: of the requests, in the order in which they come.
        config: network, prices, speeds and arrivals.

    Raises:
        DataError: if there are no records.
    """

    def __init__(self, records: Sequence[Record], config: SimulationConfig) -> None:
        if not records:
            raise DataError("there are no requests to replay")
        self.records, self.config = records, config
        token = config.price_per_1k_tokens / 1000
        self._prices = Prices(prompt=token, completion=token)
        luck = random.Random(f"network {config.seed}")
        self._trips = [(self._one_way(luck), self._one_way(luck)) for _ in records]
        self.chances = [luck.random() for _ in records]
        """A number between 0 and 1 for each request, for whoever decides by chance."""

    def at_edge(self, number: int) -> Outcome:
        """The edge's answer to one request stands."""
        edge = self.records[number].edge
        return Outcome(edge.score, 0.0, 0.0, Journey((self._edge(edge),)))

    def at_cloud(self, number: int, answered: Answered | None = None) -> Outcome:
        """The request goes to the cloud at once, whose answer is that of the record or ``answered``."""
        cloud = answered or self.records[number].cloud
        return self._in_cloud(number, (), cloud.seconds, cloud)

    def handed_over(self, number: int) -> Outcome:
        """The edge answers first, and the cloud once more."""
        record = self.records[number]
        return self._in_cloud(number, (self._edge(record.edge),), record.cloud.seconds, record.cloud)

    def verified(self, number: int) -> Outcome:
        """The edge drafts, the cloud reads prompt and draft in one pass and goes on from the first wrong token.

        The seconds are made of those measured: a pass over prompt and draft takes as much longer than one over the
        prompt as it is longer; every token after those that stand and the one that the pass itself gives takes what
        a token of the cloud's own answer took. Tokens of the draft that fall are paid for beside those of the answer.
        """
        record = self.records[number]
        cloud, draft, stand = record.cloud, record.edge.completion_tokens, accepted(record)
        reading = cloud.first_seconds * (1 + draft / max(1, cloud.prompt_tokens))
        each = (cloud.seconds - cloud.first_seconds) / max(1, cloud.completion_tokens - 1)
        seconds = reading + each * max(0, cloud.completion_tokens - stand - 1)
        return self._in_cloud(number, (self._edge(record.edge),), seconds, cloud, max(0, draft - stand))

    def play(self, policy: str, decide: Callable[[int], Outcome], threshold: float | None = None) -> Result:
        """Let all requests come, and sum up what becomes of them.

        Args:
            policy: its name.
            decide: from a request's number to what becomes of it, by the methods above.
            threshold: noted in the result.
        """
        ended = [decide(number) for number in range(len(self.records))]
        timing = replay([outcome.journey for outcome in ended], Arrivals.parse(self.config.arrivals), self.config.seed)
        shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
        p50, p90, p99 = torch.tensor(timing.latencies, dtype=torch.float64).quantile(shares).tolist()
        return Result(
            policy,
            accuracy=statistics.fmean(outcome.score for outcome in ended),
            hand_over_rate=statistics.fmean(outcome.handed_over for outcome in ended),
            cost=1000 * statistics.fmean(outcome.cost for outcome in ended),
            p50=p50,
            p90=p90,
            p99=p99,
            seconds=timing.seconds,
            threshold=threshold,
            scores=[outcome.score for outcome in ended],
        )

    def overloaded(self) -> list[Side]:
        """Sides that take longer for a request, by themselves, than there is between two; their queues never end."""
        rate = Arrivals.parse(self.config.arrivals).rate or 0.0
        edge = statistics.fmean(record.edge.seconds for record in self.records) / self.config.edge_speed
        cloud = statistics.fmean(record.cloud.seconds for record in self.records) / self.config.cloud_speed
        taken: dict[Side, float] = {"edge": edge, "cloud": cloud}
        return [side for side, seconds in taken.items() if rate * seconds >= 1]

    def _edge(self, answered: Answered) -> Stage:
        return Stage("edge", answered.seconds / self.config.edge_speed)

    def _in_cloud(
        self, number: int, before: tuple[Stage, ...], seconds: float, answered: Answered, fallen: int = 0
    ) -> Outcome:
        """The cloud's answer stands, after stages that came before it, and drafted tokens that did not."""
        up, down = self._trips[number]
        up += self._sending(self.records[number].request_bytes)
        stage = Stage("cloud", seconds / self.config.cloud_speed, up)
        journey = Journey((*before, stage), down + self._sending(len(answered.text.encode())))
        paid = cost(self._prices, Usage(answered.prompt_tokens, answered.completion_tokens + fallen))
        return Outcome(answered.score, paid, 1.0, journey)

    def _one_way(self, luck: random.Random) -> float:
        milliseconds = self.config.rtt_ms + luck.uniform(-self.config.jitter_ms, self.config.jitter_ms)
        return max(0.0, milliseconds) / 2 / 1000

    def _sending(self, size: int) -> float:
        return (HEADER_BYTES + size) * 8 / (self.config.bandwidth_mbit * 1e6)


def accepted(record: Record) -> int:
    """Tokens that the edge's answer and the cloud's begin with alike."""
    pairs = list(zip(record.edge.tokens, record.cloud.tokens, strict=False))
    return next((place for place, (left, right) in enumerate(pairs) if left != right), len(pairs))
