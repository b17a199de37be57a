"""Admission control and metrics: limits on the requests in progress, and Prometheus counters about them."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.responses import RecentRequest
from shadowtune.serving.requests import Backend, RequestError, RoutingDecision, SupportsFailure, Usage

LOGGER = logging.getLogger(__name__)
POLL_SECONDS = 0.02
RESERVED_SHARE = 4
"""One part in so many of the capacity is reserved for other clients than the largest."""
RECENT = 200
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets in seconds."""
Counters = Callable[[], Mapping[str, float]]
"""Current numbers of a backend, by names of lower-case letters and underscores."""


class AdmissionController:
    """Bounds the choices in progress, over all clients and of each; the state that the parts of an app share.

    Args:
        backend: that generates.
        config: with the limits.
        counters: numbers of the backend, for the metrics.
    """

    def __init__(self, backend: Backend, config: ServerConfig, counters: Counters = dict) -> None:
        self.backend, self.config = backend, config
        self.metrics = Metrics(counters)
        self.draining = False
        """Whether the server is about to end and admits nothing more."""
        self.closing = asyncio.Event()
        """Set once responses still in progress must end."""
        self._owners: Counter[str] = Counter()

    @property
    def in_progress(self) -> int:
        """Choices being generated or waiting."""
        return self._owners.total()

    def acquire(self, owner: str, count: int) -> None:
        """Reserve capacity for the choices of one HTTP request.

        Raises:
            RequestError: 400 if they exceed the limit by themselves, 429 beside those in progress.
        """
        room = self.config.max_requests
        if count > room:
            raise RequestError(f"{count} answers at once are more than this server's {room}; ask for fewer")
        if self.in_progress + count > room:
            raise RequestError(f"{self.in_progress} answers are under way, of at most {room}; ask again", 429)
        share = max(count, room - room // RESERVED_SHARE)
        held = self._owners.get(owner, 0)
        if owner and held + count > share:
            raise RequestError(f"{held} answers of this client are under way, of at most {share}; ask again", 429)
        self._owners[owner] += count
        self.metrics.in_progress.set(self.in_progress)

    def release(self, owner: str, count: int) -> None:
        """Free capacity."""
        self._owners[owner] -= count
        self._owners += Counter()  # drops owners with 0
        self.metrics.in_progress.set(self.in_progress)

    async def drain(self, seconds: float) -> None:
        """Admit nothing more, and wait for what is in progress; end it after so many seconds."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.in_progress and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self.closing.set()

    def failure(self) -> str | None:
        """Return why the backend can never generate again; None while it can."""
        return self.backend.failure() if isinstance(self.backend, SupportsFailure) else None


class Metrics:
    """Prometheus metrics and the last requests of one app, without prompts and outputs.

    Args:
        counters: numbers of the backend, exported as gauges.
    """

    def __init__(self, counters: Counters) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests to the API", "status", "side")
        self._tokens = self._counter("tokens", "Tokens of prompts, completions and predictions", "model", "kind")
        self._decisions = self._counter("decisions", "Routing decisions", "side", "reason")
        self._broken = self._counter("broken_answers", "Outputs that an error or the client ended", "status")
        self._seconds = self._histogram("request_seconds", "Seconds from a request to the end of its output")
        self._first = self._histogram("first_token_seconds", "Seconds from a request to its first token")
        self.in_progress = Gauge(
            "shadowtune_requests_under_way", "Choices being generated or waiting", registry=self._registry
        )
        """Choices being generated or waiting."""
        self._registry.register(_BackendGauges(counters))
        self.recent: deque[RecentRequest] = deque(maxlen=RECENT)
        """The last completed requests, newest last."""

    def _counter(self, name: str, help: str, *labels: str) -> CounterMetric:
        return CounterMetric(f"shadowtune_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"shadowtune_{name}", help, ("side",), buckets=BUCKETS, registry=self._registry)

    def responded(self, status: int, side: str) -> None:
        """Count the head of a response; ``side`` is empty where the backend was not asked."""
        self._requests.labels(str(status), side).inc()

    def broken(self, status: int) -> None:
        """Count an output that began and did not reach its end."""
        self._broken.labels(str(status)).inc()

    def completed(
        self, model: str, decision: RoutingDecision, usage: Usage, seconds: float, first_token_seconds: float
    ) -> None:
        """Count a request whose outputs reached their end."""
        for kind, count in vars(usage).items():
            self._tokens.labels(model, kind.removesuffix("_tokens")).inc(count)
        self._decisions.labels(decision.side, decision.reason).inc()
        self._seconds.labels(decision.side).observe(seconds)
        self._first.labels(decision.side).observe(first_token_seconds)
        self.recent.append(
            RecentRequest(
                time=time.time(),
                model=model,
                **vars(decision),
                seconds=seconds,
                first_token_seconds=first_token_seconds,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
            )
        )

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _BackendGauges(Collector):
    """Numbers of the backend, read when Prometheus asks."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, value in self._counters().items():
            yield GaugeMetricFamily(f"shadowtune_engine_{name}", "Number of the backend", value=value)
