"""The edge's own answer first, then a policy's decision, then the first byte: here, or from the cloud."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shadowtune.config.policy import PolicyConfig, Prices
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.breaker import CloudError
from shadowtune.serving.edge.cloud import Cloud
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.policies import Verdict, judge
from shadowtune.serving.requests import Answer, Decision, ModelCard, Piece, Request, RequestError, Usage


@dataclass(frozen=True)
class Draft:
    """A whole answer of the edge, and what the policy says of it."""

    pieces: tuple[Piece, ...]
    verdict: Verdict

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(piece.text for piece in self.pieces)


class RoutedAnswer:
    """An answer with its decision; from the cloud, reason and cost are complete once its last piece has come.

    Args:
        source: gives the pieces: a draft's, or an answer on its way.
        decision: as it is known before the first piece.
        prices: of the cloud, if it answers.
        draft: what the edge had said, where the cloud checks it.
    """

    def __init__(
        self,
        source: Answer | tuple[Piece, ...],
        decision: Decision,
        prices: Prices | None = None,
        draft: str | None = None,
    ) -> None:
        self.decision = decision
        self._source, self._prices, self._draft = source, prices, draft

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces."""
        if isinstance(self._source, tuple):
            for piece in self._source:
                yield piece
            return
        said = []
        async for piece in self._source:
            said.append(piece.text)
            if piece.usage is not None:
                self._complete("".join(said), piece.usage)
            yield piece

    async def aclose(self) -> None:
        """Stop whoever answers."""
        if not isinstance(self._source, tuple):
            await self._source.aclose()

    def _complete(self, text: str, usage: Usage) -> None:
        if self._prices is not None:
            self.decision = replace(self.decision, cost=cost(self._prices, usage))
        if self._draft is not None:
            self.decision = replace(self.decision, reason="agreed" if text == self._draft else "corrected")


def cost(prices: Prices, usage: Usage) -> float:
    """Return what an answer of the cloud costs."""
    tokens = prices.prompt * usage.prompt_tokens + prices.completion * usage.completion_tokens
    return prices.request + tokens


class Router:
    """Answers at the edge what its policy lets it, and asks the cloud for the rest.

    Whatever happens to the cloud before its first piece, the edge's own answer goes out, marked as "fallback" with the
    reason. What the edge cannot answer, such as a prompt that is too long for it, the cloud is asked for. No request
    takes longer than ``edge_deadline`` and the cloud's deadline together.

    Args:
        edge: the detached model.
        cloud: the far server.
        policy: decides.
        edge_deadline: seconds that an answer of the edge may take, its time in line included.
    """

    def __init__(self, edge: LocalModel, cloud: Cloud, policy: PolicyConfig, edge_deadline: float = 60.0) -> None:
        self.edge, self.cloud, self.policy, self.edge_deadline = edge, cloud, policy, edge_deadline

    def models(self) -> list[ModelCard]:
        """The edge's model."""
        return self.edge.models()

    def counters(self) -> dict[str, float]:
        """What runs and waits at the edge, and whether the cloud is left alone."""
        return {**self.edge.counters(), "cloud_circuit_open": float(self.cloud.breaker.state == "open")}

    def describe(self) -> Mapping[str, Any]:
        """Return kind, threshold, signal and curve of the policy."""
        policy = self.policy
        decides = policy.kind == "confidence"
        return {
            "kind": policy.kind,
            "threshold": policy.threshold if decides else None,
            "signal": policy.signal if decides else None,
            "curve": [asdict(point) for point in policy.curve] if decides else [],
        }

    def set_threshold(self, threshold: float) -> None:
        """Decide by another threshold from now on.

        Raises:
            ConfigError: if the policy has none, or it is out of its range.
        """
        if self.policy.kind != "confidence":
            raise ConfigError(
                f"policy {self.policy.kind} has no threshold; start the server with --policy-kind confidence"
            )
        self.policy = replace(self.policy, threshold=threshold)

    async def answer(self, request: Request) -> RoutedAnswer:
        """Answer at the edge, decide, and ask the cloud if need be.

        Raises:
            RequestError: if neither can answer.
        """
        policy = self.policy
        self._check_model(request)
        if policy.kind == "always-edge":
            return RoutedAnswer(await self.edge.answer(request), Decision("edge", policy.kind))
        if policy.kind == "always-cloud":
            return await self._cloud_first(request, policy)
        try:
            draft = await self._draft(request, policy)
        except RequestError as error:
            return await self._instead(request, policy, error)
        verdict = draft.verdict
        if not verdict.hand_over:
            return RoutedAnswer(draft.pieces, Decision("edge", verdict.reason, verdict.confidence))
        read = Usage(sum(piece.usage.prompt_tokens for piece in draft.pieces if piece.usage), 0)
        decision = Decision("cloud", verdict.reason, verdict.confidence, cost(policy.prices, read))
        checked = draft.text if policy.kind == "verify" else None
        try:
            source = await self.cloud.answer(replace(request, prediction=checked or request.prediction))
        except CloudError as error:
            return RoutedAnswer(draft.pieces, Decision("fallback", error.reason, verdict.confidence))
        return RoutedAnswer(source, decision, policy.prices, checked)

    def failure(self) -> str | None:
        """Why the edge's model can never answer again; None while it can."""
        return self.edge.failure()

    async def tokenize(self, request: Request) -> list[int]:
        """As the edge's model reads it."""
        return await self.edge.tokenize(request)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """As the edge's model writes it."""
        return await self.edge.detokenize(model, tokens)

    async def aclose(self) -> None:
        """Finish what was begun at the edge, and let go of the cloud."""
        await self.edge.aclose()
        await self.cloud.aclose()

    def _check_model(self, request: Request) -> None:
        names = [card.name for card in self.models()]
        if request.model not in names:
            raise RequestError(f"there is no model {request.model!r}; this server has {', '.join(names)}", 404, "model")

    async def _draft(self, request: Request, policy: PolicyConfig) -> Draft:
        """Let the edge answer in full."""
        answer = await self.edge.answer(request)
        try:
            pieces = await asyncio.wait_for(_all(answer), self.edge_deadline)
        except asyncio.TimeoutError:
            raise RequestError(f"the edge took more than {self.edge_deadline:g} s", 504) from None
        finally:
            await answer.aclose()
        text = "".join(piece.text for piece in pieces)
        return Draft(tuple(pieces), judge(policy, text, answer.signals))

    async def _cloud_first(self, request: Request, policy: PolicyConfig) -> RoutedAnswer:
        try:
            source = await self.cloud.answer(request)
        except CloudError as error:
            draft = await self._draft(request, policy)
            return RoutedAnswer(draft.pieces, Decision("fallback", error.reason, draft.verdict.confidence))
        return RoutedAnswer(source, Decision("cloud", policy.kind, None, policy.prices.request), policy.prices)

    async def _instead(self, request: Request, policy: PolicyConfig, refusal: RequestError) -> RoutedAnswer:
        """Ask the cloud for what the edge refused; if it does not answer either, the edge's reason stands."""
        try:
            source = await self.cloud.answer(request)
        except CloudError:
            raise refusal from None
        return RoutedAnswer(source, Decision("cloud", "edge could not", None, policy.prices.request), policy.prices)


async def _all(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer]
