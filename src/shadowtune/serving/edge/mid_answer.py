"""Deferral in mid-answer: the edge streams until its first unsure token, and the cloud continues from there.

The cloud gets the text so far as predicted output, verifies it in one pass and continues; only what follows that text
is sent. So the client sees one answer, and it is the cloud's own wherever the cloud agrees with the text so far. Where
it does not, or where the cloud fails, the edge completes the answer: text that was sent cannot be withdrawn. The final
decision says which side completed it, and why.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Literal

from shadowtune.config.serving import PolicyConfig
from shadowtune.serving.edge.confidence import TokenStatistics, token_confidence, token_threshold
from shadowtune.serving.edge.local import LocalModel, LocalStream
from shadowtune.serving.edge.openai_api import RemoteError
from shadowtune.serving.edge.remote import RemoteEndpoint, RemoteStream
from shadowtune.serving.edge.thresholds import response_cost
from shadowtune.serving.requests import GenerationRequest, OutputChunk, RoutingDecision, Usage

LOGGER = logging.getLogger(__name__)
CONTINUED, CONTRADICTED = "continued", "contradicted"
"""Reasons: the cloud completed the answer, or disagreed with text that was sent."""


def routes_by_token(policy: PolicyConfig, request: GenerationRequest) -> bool:
    """Whether a request can be deferred in mid-answer: greedy, without tools, schema and log-probabilities.

    A sampled answer of the cloud would not begin with the edge's sample; the others are checked or reported as a whole.
    """
    plain = request.schema is None and not request.tools and request.top_logprobs is None
    return policy.kind == "token" and request.sampling.temperature == 0 and plain


class MidAnswerStream:
    """A generation stream that begins at the edge.

    Args:
        edge: the detached model.
        cloud: the remote endpoint.
        request: a request for which ``routes_by_token`` holds.
        policy: of kind "token".
        counters: numbers of answers by how they ended, to which this one is added.
        observe: called with whether the cloud replaced the edge's text, if the cloud did not fail.
    """

    def __init__(
        self,
        edge: LocalModel,
        cloud: RemoteEndpoint,
        request: GenerationRequest,
        policy: PolicyConfig,
        counters: Counter[str],
        observe: Callable[[bool], None],
    ) -> None:
        self.decision = RoutingDecision("edge", "token")
        self._edge, self._cloud, self._request, self._policy = edge, cloud, request, policy
        self._counters, self._observe = counters, observe
        self._stream: LocalStream | RemoteStream | None = None
        self._sent = ""
        self._lowest = 1.0

    async def begin(self) -> None:
        """Submit the request to the edge.

        Raises:
            RequestError: if it is refused.
        """
        self._stream = await self._edge.generate(self._request, stops_before=self._is_unsure)

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Yield the chunks.

        Raises:
            RequestError: if neither side can complete the answer.
        """
        stream = self._stream
        assert isinstance(stream, LocalStream)
        async for chunk in stream:
            if chunk.finish_reason is not None:
                self._end("edge", "confident", replaced=False)
            self._sent += chunk.text
            yield chunk
        if stream.stopped_before is None:
            return
        own = self._sent
        try:
            async for chunk in self._continued(stream.stopped_before):
                self._sent += chunk.text
                yield chunk
            return
        except RemoteError as error:
            failure = error.reason
        await self.aclose()
        if failure != CONTRADICTED:
            written = len(self._sent) - len(own)
            LOGGER.warning(
                "deferred in mid-answer: %s, %d characters on; the edge completes the answer", failure, written
            )
            self._end("fallback", failure, replaced=None)
        generated = stream.generated if self._sent == own else await self._edge.answer_tokens(self._sent)
        async for chunk in self._completed(generated):
            yield chunk

    async def aclose(self) -> None:
        """Stop the side that is generating."""
        if self._stream is not None:
            await self._stream.aclose()

    def _is_unsure(self, token: TokenStatistics, prompt_tokens: int) -> bool:
        sure = token_confidence(token, self._policy.signal)
        self._lowest = min(self._lowest, sure)
        return sure < token_threshold(self._policy, prompt_tokens)

    async def _continued(self, replaced: str) -> AsyncIterator[OutputChunk]:
        """Yield what the cloud's answer adds to the text so far.

        Args:
            replaced: text of the edge's unsure token.

        Raises:
            RemoteError: if the cloud fails; with the reason ``CONTRADICTED`` if its answer begins otherwise.
        """
        prefix, text, received = self._sent, "", 0
        self._stream = stream = await self._cloud.generate(replace(self._request, prediction=prefix or None))
        async for chunk in stream:
            received += 1
            before = max(len(text), len(prefix))
            text += chunk.text
            last = chunk.finish_reason is not None
            if not (text.startswith(prefix) or (prefix.startswith(text) and not last)):
                used = chunk.usage or chunk.usage_so_far or Usage(0, received)
                self._end("edge", CONTRADICTED, replaced=True, usage=used)
                raise RemoteError(CONTRADICTED)
            if last:
                added = text[len(prefix) :]
                other = not added.startswith(replaced) if replaced else bool(added.strip())
                self._end("cloud", CONTINUED if prefix else "unsure", replaced=other, usage=chunk.usage)
            if last or len(text) > before:
                yield replace(chunk, text=text[before:])

    async def _completed(self, generated: list[int]) -> AsyncIterator[OutputChunk]:
        """Let the edge complete the text so far, which begins with the tokens ``generated``."""
        self._stream = stream = await self._edge.generate(self._request, prefix=tuple(generated))
        text, sent = "", len(self._sent)
        async for chunk in stream:
            before = max(len(text), sent)
            text += chunk.text
            if chunk.finish_reason is not None or len(text) > before:
                yield replace(chunk, text=text[before:])

    def _end(
        self, side: Literal["edge", "cloud", "fallback"], reason: str, replaced: bool | None, usage: Usage | None = None
    ) -> None:
        """Set the final decision, and count it.

        Args:
            side: that completes the answer.
            reason: why.
            replaced: whether the cloud replaced the edge's text; None if it failed.
            usage: of the cloud.
        """
        cost = 0.0 if usage is None else response_cost(self._policy.prices, usage)
        self.decision = RoutingDecision(side, reason, self._lowest, cost)
        outcome = "fallback" if side == "fallback" else reason
        self._counters[f"mid_answer_{outcome}"] += 1
        if replaced is not None:
            self._observe(replaced)
