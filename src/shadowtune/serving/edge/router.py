"""Route each request: the edge answers in full, the policy decides, and the cloud answers what is deferred.

The first byte goes to the client after the decision, so that it never sees two answers. A policy of kind "token"
decides while the edge streams (``mid_answer``).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shadowtune.config.serving import PolicyConfig, Prices
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.confidence import PolicyDecision, decide
from shadowtune.serving.edge.drift import DriftMonitor
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.mid_answer import MidAnswerStream, routes_by_token
from shadowtune.serving.edge.openai_api import RemoteError
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.thresholds import response_cost
from shadowtune.serving.requests import (
    GenerationRequest,
    GenerationStream,
    ModelCard,
    OutputChunk,
    RequestError,
    RoutingDecision,
    Usage,
)

LOGGER = logging.getLogger(__name__)
MID_ANSWER_COUNTERS = tuple(
    f"mid_answer_{outcome}" for outcome in ("confident", "unsure", "continued", "contradicted", "fallback")
)
"""Answers of a policy of kind "token": of the edge alone, of the cloud alone, by the cloud from a text of the edge
on, by the edge because the cloud disagreed, and by the edge because the cloud failed."""


@dataclass(frozen=True)
class EdgeAnswer:
    """A complete answer of the edge, and the policy's decision about it."""

    text: str
    chunks: tuple[OutputChunk, ...]
    decision: PolicyDecision


class RoutedStream:
    """A generation stream with its decision; for the cloud, reason and cost are final once the last chunk has come.

    Args:
        source: the edge's chunks, or a stream.
        decision: as far as known before the first chunk.
        prices: of the cloud, if it answers.
        draft: the edge's text, if the cloud verifies it.
        observe: called with the cloud's whole text.
    """

    def __init__(
        self,
        source: GenerationStream | tuple[OutputChunk, ...],
        decision: RoutingDecision,
        prices: Prices | None = None,
        draft: str | None = None,
        observe: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.decision = decision
        self._source, self._prices, self._draft, self._observe = source, prices, draft, observe

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Yield the chunks."""
        if isinstance(self._source, tuple):
            for chunk in self._source:
                yield chunk
            return
        text = ""
        async for chunk in self._source:
            text += chunk.text
            if chunk.usage is not None:
                self._complete(text, chunk.usage)
            yield chunk

    async def aclose(self) -> None:
        """Stop the generation."""
        if not isinstance(self._source, tuple):
            await self._source.aclose()

    def _complete(self, text: str, usage: Usage) -> None:
        self._observe(text)
        if self._prices is not None:
            self.decision = replace(self.decision, cost=response_cost(self._prices, usage))
        if self._draft is not None:
            self.decision = replace(self.decision, reason="agreed" if text == self._draft else "corrected")


class Router:
    """A backend that answers requests at the edge, and defers to the cloud those that its policy selects.

    If the cloud fails before its first chunk, the edge's own answer is used, with side "fallback" and the reason. The
    cloud is also asked for what the edge cannot answer, such as a prompt that is too long for it. A first byte takes at
    most ``edge_deadline`` plus the cloud's deadline.

    Args:
        edge: the detached model.
        cloud: the remote endpoint.
        policy: decides about each answer of the edge.
        edge_deadline: seconds for an answer of the edge, waiting included.
    """

    def __init__(
        self, edge: LocalModel, cloud: RemoteEndpoint, policy: PolicyConfig, edge_deadline: float = 60.0
    ) -> None:
        self.edge, self.cloud, self.policy, self.edge_deadline = edge, cloud, policy, edge_deadline
        self.drift = DriftMonitor(policy)
        self._mid_answer: Counter[str] = Counter(dict.fromkeys(MID_ANSWER_COUNTERS, 0))

    def models(self) -> list[ModelCard]:
        """Return the edge's model."""
        return self.edge.models()

    def counters(self) -> dict[str, float]:
        """Return the edge's running and waiting requests, the state of the circuit breaker, and of the drift alarm."""
        status = self.drift.status()
        return {
            **self.edge.counters(),
            "cloud_circuit_open": float(self.cloud.breaker.state == "open"),
            "correction_rate": status.rate,
            "drift_evidence": status.evidence,
            "drift_alarms": status.alarms,
            "drift_alarmed": float(status.alarmed),
            **self._mid_answer,
        }

    def failure(self) -> str | None:
        """Return why the edge's model can never answer again; None while it can."""
        return self.edge.failure()

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the token ids of a request's prompt, by the edge's tokenizer."""
        return await self.edge.tokenize(request)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, by the edge's tokenizer."""
        return await self.edge.detokenize(model, tokens)

    def describe(self) -> Mapping[str, Any]:
        """Return kind, threshold, signal and curve of the policy, and the state of its drift alarm."""
        policy = self.policy
        tunable = policy.kind == "confidence" or (policy.kind == "token" and policy.value is None)
        return {
            "kind": policy.kind,
            "threshold": policy.threshold if tunable else None,
            "signal": policy.signal if tunable else None,
            "curve": [asdict(point) for point in policy.curve] if tunable else [],
            "reliability": [asdict(point) for point in policy.reliability] if tunable else [],
            "drift": asdict(self.drift.status()) if policy.drift.enabled else None,
        }

    def set_threshold(self, threshold: float) -> None:
        """Change the threshold for later requests.

        Raises:
            ConfigError: if the policy has none, or it is out of range.
        """
        if self.describe()["threshold"] is None:
            raise ConfigError(
                f"policy {self.policy.kind} has no threshold; start the server with --policy-kind confidence"
            )
        self.policy = replace(self.policy, threshold=threshold)
        self.drift.set_policy(self.policy)

    async def generate(self, request: GenerationRequest) -> "RoutedStream | MidAnswerStream":
        """Answer at the edge, decide, and ask the cloud if the answer is deferred.

        Raises:
            RequestError: if neither can answer.
        """
        policy = self.policy
        names = [card.name for card in self.models()]
        if request.model not in names:
            raise RequestError(f"there is no model {request.model!r}; this server has {', '.join(names)}", 404, "model")
        if policy.kind == "always-edge":
            return RoutedStream(await self.edge.generate(request), RoutingDecision("edge", policy.kind))
        if policy.kind == "always-cloud":
            return await self._answer_in_cloud(request, policy)
        try:
            if routes_by_token(policy, request):
                return await self._begin_at_edge(request, policy)
            edge = await self._answer_at_edge(request, policy)
        except RequestError as error:
            try:
                return await self._ask_cloud(request, policy, "edge could not")
            except RemoteError:
                raise error from None
        decision = edge.decision
        greedy = request.sampling.temperature == 0
        if not decision.defer:
            self.drift.observe(False, greedy)
            return RoutedStream(edge.chunks, RoutingDecision("edge", decision.reason, decision.confidence))
        draft = edge.text if policy.kind == "verify" else None
        read = Usage(sum(chunk.usage.prompt_tokens for chunk in edge.chunks if chunk.usage), 0)
        try:
            source = await self.cloud.generate(replace(request, prediction=draft or request.prediction))
        except RemoteError as error:
            return _fallback(edge, error)
        cost = response_cost(policy.prices, read)
        return RoutedStream(
            source,
            RoutingDecision("cloud", decision.reason, decision.confidence, cost),
            policy.prices,
            draft,
            lambda text: self.drift.observe(text.strip() != edge.text.strip(), greedy),
        )

    async def aclose(self) -> None:
        """Let the edge finish, and close the connections to the cloud."""
        await self.edge.aclose()
        await self.cloud.aclose()

    async def _begin_at_edge(self, request: GenerationRequest, policy: PolicyConfig) -> MidAnswerStream:
        def observe(replaced: bool) -> None:
            self.drift.observe(replaced, greedy=True)

        stream = MidAnswerStream(self.edge, self.cloud, request, policy, self._mid_answer, observe)
        await stream.begin()
        return stream

    async def _answer_at_edge(self, request: GenerationRequest, policy: PolicyConfig) -> EdgeAnswer:
        stream = await self.edge.generate(request)
        try:
            chunks = await asyncio.wait_for(_collect(stream), self.edge_deadline)
        except asyncio.TimeoutError:
            raise RequestError(f"the edge took more than {self.edge_deadline:g} s", 504) from None
        finally:
            await stream.aclose()
        text = "".join(chunk.text for chunk in chunks)
        return EdgeAnswer(text, chunks, decide(policy, text, stream.signals))

    async def _answer_in_cloud(self, request: GenerationRequest, policy: PolicyConfig) -> RoutedStream:
        try:
            return await self._ask_cloud(request, policy, policy.kind)
        except RemoteError as error:
            return _fallback(await self._answer_at_edge(request, policy), error)

    async def _ask_cloud(self, request: GenerationRequest, policy: PolicyConfig, reason: str) -> RoutedStream:
        source = await self.cloud.generate(request)
        return RoutedStream(source, RoutingDecision("cloud", reason, None, policy.prices.request), policy.prices)


async def _collect(stream: GenerationStream) -> tuple[OutputChunk, ...]:
    return tuple([chunk async for chunk in stream])


def _fallback(edge: EdgeAnswer, error: RemoteError) -> RoutedStream:
    """Return the edge's answer in place of the cloud's, and log why."""
    LOGGER.warning("deferred, but %s; the edge's answer is used", error)
    return RoutedStream(edge.chunks, RoutingDecision("fallback", error.reason, edge.decision.confidence))
