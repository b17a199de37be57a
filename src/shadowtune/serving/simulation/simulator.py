"""Simulate edge, network and cloud on recorded answers: score, cost and latency of each request.

Each side is one server with a first-come-first-served queue; the network adds latency between them.
"""

import heapq
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from shadowtune.config.serving import Arrivals, Prices, SimulationConfig
from shadowtune.errors import DataError
from shadowtune.serving.edge.thresholds import response_cost
from shadowtune.serving.requests import Usage
from shadowtune.serving.simulation.records import RecordedAnswer, RequestRecord

Server = Literal["edge", "cloud"]
HEADER_BYTES = 1000
"""Sent with each request and each answer over an open connection."""


@dataclass(frozen=True)
class ServiceStep:
    """One server's work on a request."""

    server: Server
    seconds: float
    """For which the server is busy."""
    latency: float = 0.0
    """Seconds of network before it."""


@dataclass(frozen=True)
class RequestTrace:
    """The servers that a request passes between its arrival and its answer."""

    steps: tuple[ServiceStep, ...]
    return_latency: float = 0.0
    """Seconds of network after the last server."""
    first_step: int = -1
    """Index of the step in which the first token that the client gets is generated."""
    first_seconds: float | None = None
    """From the begin of that step to this token; None for the whole step."""
    first_latency: float | None = None
    """Seconds of network from that server to the client; None for ``return_latency``."""


@dataclass(frozen=True)
class ReplayTiming:
    """The latencies of a replay."""

    latencies: list[float]
    """Seconds from each request's arrival to its complete answer, in the order of the requests."""
    first_latencies: list[float]
    """Likewise to its first token."""
    seconds: float
    """From the first arrival to the last answer."""


def replay(traces: Sequence[RequestTrace], arrivals: Arrivals, seed: int = 0) -> ReplayTiming:
    """Run requests through the two servers, in the order of their arrival.

    Args:
        traces: of the requests, at least one.
        arrivals: when they arrive.
        seed: of the times between arrivals, which do not depend on the traces.
    """
    times = _arrival_times(len(traces), arrivals, seed)
    waiting = list(range(len(traces) - 1, len(times) - 1, -1))
    arrived = dict(enumerate(times))
    ended, first = [0.0] * len(traces), [0.0] * len(traces)
    free: dict[Server, float] = {"edge": 0.0, "cloud": 0.0}
    # (time, request, index of the step it reaches), so that ties are served in the order of the requests
    events = [_event(traces[request], request, 0, time) for request, time in arrived.items()]
    heapq.heapify(events)
    while events:
        time, request, index = heapq.heappop(events)
        trace = traces[request]
        if index < len(trace.steps):
            step = trace.steps[index]
            begun = max(time, free[step.server])
            free[step.server] = begun + step.seconds
            if index == trace.first_step % len(trace.steps):
                seconds = step.seconds if trace.first_seconds is None else trace.first_seconds
                back = trace.return_latency if trace.first_latency is None else trace.first_latency
                first[request] = begun + seconds + back
            heapq.heappush(events, _event(trace, request, index + 1, free[step.server]))
            continue
        ended[request] = time
        if waiting:  # a client that waited for this answer sends the next request
            following = waiting.pop()
            arrived[following] = time
            heapq.heappush(events, _event(traces[following], following, 0, time))
    latencies = [end - arrived[request] for request, end in enumerate(ended)]
    first_latencies = [moment - arrived[request] for request, moment in enumerate(first)]
    return ReplayTiming(latencies, first_latencies, max(ended) - times[0])


def _event(trace: RequestTrace, request: int, index: int, sent: float) -> tuple[float, int, int]:
    """Return when a request that was sent at ``sent`` reaches a step, or its client after the last."""
    latency = trace.steps[index].latency if index < len(trace.steps) else trace.return_latency
    return sent + latency, request, index


def _arrival_times(count: int, arrivals: Arrivals, seed: int) -> list[float]:
    """Return the arrivals that depend on no answer: all of them or, with waiting clients, the first of each client."""
    if arrivals.rate is None:
        return [0.0] * min(count, arrivals.clients)
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(arrivals.rate)
        times.append(now)
    return times


@dataclass(frozen=True)
class RequestOutcome:
    """The result of one request."""

    score: float
    cost: float
    """In units of ``SimulationConfig.price_per_1k_tokens``."""
    deferred: float
    """1 if the cloud was asked, 0 if not; a probability for a random router."""
    trace: RequestTrace
    decoded: float = 0.0
    """Tokens that the cloud generated one after the other, without those that it verified in one pass."""


@dataclass(frozen=True)
class SimulationResult:
    """The result of all requests under one policy."""

    policy: str
    accuracy: float
    """Mean of the scores."""
    deferral_rate: float
    """Share of the requests that the cloud was asked."""
    cost: float
    """Of a thousand requests."""
    p50: float
    """Median latency in seconds, from a request's arrival to its complete answer."""
    p90: float
    p99: float
    seconds: float
    """From the first arrival to the last answer."""
    first_p50: float = 0.0
    """Median seconds from a request's arrival to the first token that its client gets."""
    first_p90: float = 0.0
    cloud_tokens: float = 0.0
    """Mean number of tokens that the cloud generates for a request, without those that it verifies in one pass."""
    threshold: float | None = None
    """Of the confidence below which requests were deferred."""
    scores: list[float] = field(repr=False, default_factory=list)
    """Of each request."""


class Simulator:
    """Recorded answers and a network between the two sides.

    A request has the same jitter and arrival under every policy.

    Args:
        records: of the requests, in the order in which they arrive.
        config: network, prices, speeds and arrivals.

    Raises:
        DataError: if there are no records.
    """

    def __init__(self, records: Sequence[RequestRecord], config: SimulationConfig) -> None:
        if not records:
            raise DataError("there are no requests to replay")
        self.records, self.config = records, config
        token = config.price_per_1k_tokens / 1000
        self._prices = Prices(prompt=token, completion=token)
        rng = random.Random(f"network {config.seed}")
        self._latencies = [(self._one_way(rng), self._one_way(rng)) for _ in records]
        self.uniforms = [rng.random() for _ in records]
        """A number from 0 to 1 for each request, for random routers."""

    def at_edge(self, number: int, streamed: bool = True) -> RequestOutcome:
        """Return the outcome of one request that the edge answers: token by token, or as a whole after a decision."""
        edge = self.records[number].edge
        first = edge.first_seconds / self.config.edge_speed if streamed else None
        return RequestOutcome(edge.score, 0.0, 0.0, RequestTrace((self._edge_step(edge),), first_seconds=first))

    def at_cloud(self, number: int, answer: RecordedAnswer | None = None) -> RequestOutcome:
        """Return the outcome of one request that goes straight to the cloud, which gives ``answer`` or its own."""
        cloud = answer or self.records[number].cloud
        return self._cloud_outcome(number, (), cloud.seconds, cloud.first_seconds, cloud)

    def deferred(self, number: int) -> RequestOutcome:
        """Return the outcome of one request that the edge answers first and the cloud anew."""
        record = self.records[number]
        cloud = record.cloud
        return self._cloud_outcome(number, (self._edge_step(record.edge),), cloud.seconds, cloud.first_seconds, cloud)

    def verified(self, number: int) -> RequestOutcome:
        """Return the outcome of one request whose edge answer the cloud verifies in one pass and corrects.

        The seconds are estimated from the measured ones: a pass over prompt and draft scales with their length; each
        token after the accepted ones and the one that the pass itself gives takes as long as the cloud's mean token.
        Rejected draft tokens are paid for in addition to those of the answer.
        """
        record = self.records[number]
        cloud, draft, accepted = record.cloud, record.edge.completion_tokens, common_prefix(record)
        verification = cloud.first_seconds * (1 + draft / max(1, cloud.prompt_tokens))
        per_token = (cloud.seconds - cloud.first_seconds) / max(1, cloud.completion_tokens - 1)
        seconds = verification + per_token * max(0, cloud.completion_tokens - accepted - 1)
        before, rejected = (self._edge_step(record.edge),), max(0, draft - accepted)
        return self._cloud_outcome(number, before, seconds, verification, cloud, rejected, accepted)

    def mid_answer(self, number: int, index: int) -> RequestOutcome:
        """Return the outcome of one request whose edge answer the cloud continues from its token ``index`` on.

        The edge decodes up to that token, the cloud verifies the text so far in one pass and, if it agrees, continues.
        Otherwise the edge completes its answer, after a pass over prompt and text. Seconds are estimated as in
        ``verified``, those of the edge's tokens as equal parts of its decoding.
        """
        record = self.records[number]
        edge, cloud = record.edge, record.cloud
        per_token = (edge.seconds - edge.first_seconds) / max(1, edge.completion_tokens - 1)
        begun = ServiceStep("edge", (edge.first_seconds + per_token * index) / self.config.edge_speed)
        verification = cloud.first_seconds * (1 + index / max(1, cloud.prompt_tokens))
        if common_prefix(record) >= min(index, len(edge.tokens)):
            rate = (cloud.seconds - cloud.first_seconds) / max(1, cloud.completion_tokens - 1)
            seconds = verification + rate * max(0, cloud.completion_tokens - index - 1)
            outcome = self._cloud_outcome(number, (begun,), seconds, verification, cloud, accepted=index)
            return outcome if index == 0 else replace(outcome, trace=self._begun_at_edge(outcome.trace, edge))
        up, down = self._latencies[number]
        up += self._transfer_seconds(record.request_bytes)
        checked = ServiceStep("cloud", verification / self.config.cloud_speed, up)
        rest = edge.first_seconds * (1 + index / max(1, edge.prompt_tokens))
        rest += per_token * max(0, edge.completion_tokens - index - 1)
        back = down + self._transfer_seconds(0)
        completed = ServiceStep("edge", rest / self.config.edge_speed, back)
        cost = response_cost(self._prices, Usage(cloud.prompt_tokens, index))
        trace = self._begun_at_edge(RequestTrace((begun, checked, completed)), edge)
        return RequestOutcome(edge.score, cost, 1.0, trace)

    def run(
        self, policy: str, outcome: Callable[[int], RequestOutcome], threshold: float | None = None
    ) -> SimulationResult:
        """Replay all requests under one policy.

        Args:
            policy: its name.
            outcome: from a request's number to its outcome, by the methods above.
            threshold: noted in the result.
        """
        ended = [outcome(number) for number in range(len(self.records))]
        timing = replay([each.trace for each in ended], Arrivals.parse(self.config.arrivals), self.config.seed)
        shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
        p50, p90, p99 = torch.tensor(timing.latencies, dtype=torch.float64).quantile(shares).tolist()
        first_p50, first_p90, _ = torch.tensor(timing.first_latencies, dtype=torch.float64).quantile(shares).tolist()
        return SimulationResult(
            policy,
            accuracy=statistics.fmean(each.score for each in ended),
            deferral_rate=statistics.fmean(each.deferred for each in ended),
            cost=1000 * statistics.fmean(each.cost for each in ended),
            p50=p50,
            p90=p90,
            p99=p99,
            first_p50=first_p50,
            first_p90=first_p90,
            seconds=timing.seconds,
            cloud_tokens=statistics.fmean(each.decoded for each in ended),
            threshold=threshold,
            scores=[each.score for each in ended],
        )

    def overloaded(self) -> list[Server]:
        """Return the servers whose mean service time exceeds the time between arrivals, so that their queues grow."""
        rate = Arrivals.parse(self.config.arrivals).rate or 0.0
        edge = statistics.fmean(record.edge.seconds for record in self.records) / self.config.edge_speed
        cloud = statistics.fmean(record.cloud.seconds for record in self.records) / self.config.cloud_speed
        taken: dict[Server, float] = {"edge": edge, "cloud": cloud}
        return [server for server, seconds in taken.items() if rate * seconds >= 1]

    def _begun_at_edge(self, trace: RequestTrace, edge: RecordedAnswer) -> RequestTrace:
        """Return a trace whose first token is the edge's."""
        seconds = edge.first_seconds / self.config.edge_speed
        return replace(trace, first_step=0, first_seconds=seconds, first_latency=0.0)

    def _edge_step(self, answer: RecordedAnswer) -> ServiceStep:
        return ServiceStep("edge", answer.seconds / self.config.edge_speed)

    def _cloud_outcome(
        self,
        number: int,
        before: tuple[ServiceStep, ...],
        seconds: float,
        first_seconds: float,
        answer: RecordedAnswer,
        rejected: int = 0,
        accepted: int = 0,
    ) -> RequestOutcome:
        """Return the outcome of one request that the cloud answers in the end.

        Args:
            number: of the request.
            before: steps of the edge.
            seconds: of the cloud's work on this machine.
            first_seconds: of them up to the first token.
            answer: of the cloud.
            rejected: draft tokens that are paid for beside those of the answer.
            accepted: draft tokens that are those of the answer.
        """
        up, down = self._latencies[number]
        up += self._transfer_seconds(self.records[number].request_bytes)
        step = ServiceStep("cloud", seconds / self.config.cloud_speed, up)
        back, first = down + self._transfer_seconds(len(answer.text.encode())), first_seconds / self.config.cloud_speed
        trace = RequestTrace((*before, step), back, first_seconds=first, first_latency=down + self._transfer_seconds(0))
        cost = response_cost(self._prices, Usage(answer.prompt_tokens, answer.completion_tokens + rejected))
        return RequestOutcome(answer.score, cost, 1.0, trace, max(0, answer.completion_tokens - accepted))

    def _one_way(self, rng: random.Random) -> float:
        milliseconds = self.config.rtt_ms + rng.uniform(-self.config.jitter_ms, self.config.jitter_ms)
        return max(0.0, milliseconds) / 2 / 1000

    def _transfer_seconds(self, size: int) -> float:
        return (HEADER_BYTES + size) * 8 / (self.config.bandwidth_mbit * 1e6)


def common_prefix(record: RequestRecord) -> int:
    """Return the number of tokens with which the answers of edge and cloud begin alike."""
    pairs = list(zip(record.edge.tokens, record.cloud.tokens, strict=False))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(pairs))
