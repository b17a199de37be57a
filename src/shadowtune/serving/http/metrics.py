"""What a server did, in numbers: for Prometheus, and the last requests for the page. Never what was said."""

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shadowtune.serving.http.control import Counters
from shadowtune.serving.http.flow import Flow
from shadowtune.serving.http.replies import RecentRequest

RECENT = 200
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Counters, histograms and the last requests of one app.

    Args:
        counters: numbers of whoever answers, shown as they are.
    """

    def __init__(self, counters: Counters) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests to the API", "status", "side")
        self._tokens = self._counter("tokens", "Tokens read, written, and foretold", "model", "kind")
        self._decisions = self._counter("decisions", "Who answered, and why", "side", "reason")
        self._broken = self._counter("broken_answers", "Answers that ended before their end", "status")
        self._seconds = self._histogram("request_seconds", "From a request to the end of its answer")
        self._first = self._histogram("first_token_seconds", "From a request to its first token")
        self.under_way = Gauge(
            "shadowtune_requests_under_way", "Choices being answered or waiting", registry=self._registry
        )
        """Choices that hold a place."""
        self._registry.register(_Shown(counters))
        self.recent: deque[RecentRequest] = deque(maxlen=RECENT)
        """The last answered requests, newest last."""

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"shadowtune_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"shadowtune_{name}", help, ("side",), buckets=SECONDS, registry=self._registry)

    def responded(self, status: int, side: str) -> None:
        """Count a response's head; ``side`` is empty where nobody was asked."""
        self._requests.labels(str(status), side).inc()

    def broke(self, status: int) -> None:
        """Count an answer that was begun and did not reach its end."""
        self._broken.labels(str(status)).inc()

    def answered(self, flow: Flow) -> None:
        """Count a request that was answered to its end."""
        usage, decision, model = flow.usage, flow.decision, flow.requests[0].model
        assert usage is not None
        now = time.monotonic()
        seconds, first = now - flow.begun, (flow.first or now) - flow.begun
        for kind, count in vars(usage).items():
            self._tokens.labels(model, kind.removesuffix("_tokens")).inc(count)
        self._decisions.labels(decision.side, decision.reason).inc()
        self._seconds.labels(decision.side).observe(seconds)
        self._first.labels(decision.side).observe(first)
        self.recent.append(
            RecentRequest(
                time=time.time(),
                model=model,
                **vars(decision),
                seconds=seconds,
                first_token_seconds=first,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
            )
        )

    def exposition(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)


class _Shown(Collector):
    """The answerer's own numbers, read when asked for."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, value in self._counters().items():
            yield GaugeMetricFamily(f"shadowtune_engine_{name}", "Of whoever answers", value=value)
