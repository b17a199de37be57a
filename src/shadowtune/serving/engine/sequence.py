"""State of one request while it is decoded: its tokens, sampling, stop conditions and pending output."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from shadowtune.core.shared_prompt import shared_prompt_length
from shadowtune.serving.constrained import SchemaMatcher
from shadowtune.serving.detokenizer import IncrementalDetokenizer
from shadowtune.serving.engine.adapter import Adapter
from shadowtune.serving.requests import (
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    OutputChunk,
    RequestError,
    Usage,
)
from shadowtune.serving.sampling import logits_processors, random_generator, sample

Deliver = Callable[[OutputChunk | RequestError | None], None]
"""Receives the next chunk or the error of an output; None after the last."""
LOGITS_BLOCK = 64
"""Positions whose logits are computed at once: of a long prediction that is rejected early, few are needed."""


class LazyLogits:
    """Logits at the positions of a pass that choose a token, computed in blocks when they are read.

    Args:
        states: last hidden states (M, d).
        head: (..., d) -> (..., V).
    """

    def __init__(self, states: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        self._states, self._head = states, head
        self._block = -1
        self._values: Tensor | None = None
        self._arg_max: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the logits (V,) at a position, float32, and their arg max."""
        block, offset = divmod(index, LOGITS_BLOCK)
        if block != self._block or self._values is None:
            self._values = self._head(self._states[block * LOGITS_BLOCK : (block + 1) * LOGITS_BLOCK]).float()
            self._block, self._arg_max = block, self._values.argmax(-1).tolist()
        return self._values[offset], self._arg_max[offset]


class Sampler:
    """Chooses the tokens of one sequence: schema constraints, logits processors, then sampling.

    Args:
        request: with the sampling settings.
        prompt_length: tokens of the prompt.
        stop_tokens: tokens that are suppressed until there are ``min_tokens``.
        device: of the logits.
        generation: the model's generation config, whose penalties hold where the request sets none.
        matcher: of the schema that the output must fit, if there is one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_length: int,
        stop_tokens: frozenset[int],
        device: torch.device,
        generation: GenerationConfig | None = None,
        matcher: SchemaMatcher | None = None,
    ) -> None:
        self.matcher = matcher
        self._sampling, self._first_end = request.sampling, prompt_length + request.min_tokens
        self._suppressed = sorted(stop_tokens) if request.min_tokens else []
        self._processors = logits_processors(request.sampling, prompt_length, generation)
        self._generator = random_generator(request.sampling, device)
        plain = not self._processors and matcher is None and not self._suppressed
        self._greedy = request.sampling.temperature == 0 and plain

    def choose(self, tokens: list[int], values: Tensor, arg_max: int) -> int:
        """Return the next token.

        Args:
            tokens: prompt and output so far.
            values: logits (V,).
            arg_max: of the logits.

        Raises:
            RequestError: if no token is allowed.
        """
        if self._greedy:
            return arg_max
        scores: Any = values if self.matcher is None else self.matcher.restrict(values)
        if len(tokens) < self._first_end:
            scores = scores.index_fill(0, torch.tensor(self._suppressed, device=scores.device), -torch.inf)
        if scores.max() == -torch.inf:
            raise RequestError("no token may follow: the schema is complete before min_tokens", param="min_tokens")
        prefix: Any = torch.tensor([tokens], device=values.device)
        return sample(self._processors(prefix, scores[None])[0], self._sampling, self._generator)


@dataclass(frozen=True)
class TokenizedRequest:
    """Token ids of a request; the same for each of its outputs."""

    prompt: list[int]
    prediction: list[int]


class Sequence:
    """A request being decoded.

    Args:
        request: what is asked.
        adapter: that generates; None for the bare base.
        tokenized: prompt and predicted output.
        max_length: most tokens of prompt and output.
        stop_tokens: token ids that end the output.
        sampler: chooses its tokens.
        tokenizer: of the base.
        deliver: receives the output.
    """

    def __init__(
        self,
        request: GenerationRequest,
        adapter: Adapter | None,
        tokenized: TokenizedRequest,
        max_length: int,
        stop_tokens: frozenset[int],
        sampler: Sampler,
        tokenizer: Any,
        deliver: Deliver,
    ) -> None:
        self.request, self.adapter, self.deliver, self.max_length = request, adapter, deliver, max_length
        self.tokens, self.prompt_length = list(tokenized.prompt), len(tokenized.prompt)
        self.prediction, self.accepted = tokenized.prediction, 0
        marker = None if adapter is None else adapter.boundaries.config.injection_after
        shared = self.prompt_length if adapter is None else shared_prompt_length(self.tokens, marker)
        self.shared_prompt = self.tokens[:shared]
        """Leading tokens of the prompt that run as in the bare base."""
        self.cached = 0
        """Number of tokens in the key-value caches."""
        self.lower_states: list[Tensor] | None = []
        """Output of the blocks below the first injection, (1, T, d) of each part of the prompt; None if not known."""
        self.reused: tuple[int, Tensor] | None = None
        """Leading tokens whose lower blocks are reused, and the output of these (1, T, d); None once all have run."""
        self.record: list[tuple[Tensor, Tensor, list[int]]] = []
        """Draft features (t, n), s0 (t, d) and ids of the generated tokens of each pass, if its draft head learns."""
        self.last_hidden: Tensor | None = None
        """The attached model's draft features (n,) where the last token was chosen, if a drafter reads them."""
        self.finish_reason: FinishReason | None = None
        self._stop_tokens, self._sampler, self._tokenizer = stop_tokens, sampler, tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.stop, request.min_tokens)
        self._pending_text, self._pending_tokens = "", list[GeneratedToken]()

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt was processed, and the first token generated."""
        return len(self.tokens) > self.prompt_length

    @property
    def untouched(self) -> bool:
        """Whether no network has run over the prompt yet, and nothing of it is reused."""
        return self.cached == 0 and self.reused is None

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_length - len(self.tokens)

    def next_chunk(self, limit: int) -> tuple[list[int], list[int] | None]:
        """Return the next part of the prompt, at most ``limit`` tokens, and the predicted tokens appended to it.

        The latter are None unless the part is the last: a prediction is processed with the end of the prompt, whole.
        """
        chunk = self.tokens[self.cached : min(self.cached + limit, self.prompt_length)]
        if self.cached + len(chunk) < self.prompt_length:
            return chunk, None
        expected = self.prediction[: self.remaining]
        return chunk + expected, expected

    def verify(self, logits: LazyLogits, first: int, expected: list[int]) -> int:
        """Generate tokens as long as they equal the expected ones, and one more.

        A token depends only on the logits at its position and the sequence's own generator, which draws once per
        position: what was expected changes how many tokens a pass yields, never which.

        Args:
            logits: of a pass.
            first: index in them of this sequence's last token; the expected tokens follow.
            expected: drafted or predicted tokens that the networks have processed.

        Returns:
            How many of the expected tokens are accepted.

        Raises:
            RequestError: if the logits are not finite, or no token is allowed.
        """
        for index in range(len(expected) + 1):
            values, arg_max = logits[first + index]
            if not math.isfinite(values[arg_max]):  # the largest is NaN where any of them is
                raise RequestError("the model's logits are not finite: its weights or states hold NaN or infinity", 500)
            token = self._sampler.choose(self.tokens, values, arg_max)
            self._append(token, values)
            accepted = index < len(expected) and token == expected[index]
            if self.finish_reason is not None or not accepted:
                break
        self.cached = len(self.tokens) - 1
        return index + accepted

    def take_output(self) -> OutputChunk | None:
        """Return the output since the last call; None if there is none."""
        generated = len(self.tokens) - self.prompt_length
        usage, so_far = None, Usage(self.prompt_length, generated)
        if self.finish_reason is not None:
            self._pending_text += self._detokenizer.flush()
            usage = Usage(self.prompt_length, generated, self.accepted, len(self.prediction) - self.accepted)
        if not (self._pending_text or self._pending_tokens or usage):
            return None
        tokens = tuple(self._pending_tokens)
        chunk = OutputChunk(self._pending_text, tokens, self.finish_reason, usage, usage_so_far=so_far)
        self._pending_text, self._pending_tokens = "", []
        return chunk

    def _append(self, token: int, values: Tensor) -> None:
        matcher = self._sampler.matcher
        self.tokens.append(token)
        if token in self._stop_tokens:
            self.finish_reason = "stop"
            return
        if matcher is not None:
            matcher.advance(token)
        self._pending_text += self._detokenizer.add(token)
        if self.request.top_logprobs is not None:
            self._pending_tokens.append(self._with_logprobs(token, values, self.request.top_logprobs))
        if self._detokenizer.stopped or (matcher is not None and matcher.complete):
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            self.finish_reason = "length"

    def _with_logprobs(self, token: int, values: Tensor, alternatives: int) -> GeneratedToken:
        logprobs = values.log_softmax(-1)
        best = logprobs.topk(min(alternatives, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple((other, self._decode(other), logprob) for other, logprob in pairs)
        return GeneratedToken(token, self._decode(token), float(logprobs[token]), top)

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
