"""One request while it is answered: its tokens, how the next is chosen, and what is said of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from shadowtune.serving.constrained import Follower
from shadowtune.serving.engine.adapters import Adapter
from shadowtune.serving.engine.logits import Logits
from shadowtune.serving.requests import FinishReason, Piece, Request, RequestError, Token, Usage
from shadowtune.serving.sampling import choose, generator, processors
from shadowtune.serving.wording import Wording

Deliver = Callable[[Piece | RequestError | None], None]
"""Takes the next piece of an answer, or why there is none; None after the last."""


class Row:
    """A row of the batch.

    Args:
        request: what is asked.
        adapter: whose answer it is; None for the bare base.
        prompt: its token ids.
        prediction: token ids of what the answer may be.
        room: tokens that prompt and answer may have.
        ends: tokens that end an answer.
        tokenizer: of the base.
        device: of the logits.
        deliver: where the answer goes.
        generation: the model's generation config, whose penalties hold where the request does not say otherwise.
        follower: of the schema that the answer must fit, if there is one.
    """

    def __init__(
        self,
        request: Request,
        adapter: Adapter | None,
        prompt: Sequence[int],
        prediction: Sequence[int],
        room: int,
        ends: frozenset[int],
        tokenizer: Any,
        device: torch.device,
        deliver: Deliver,
        generation: GenerationConfig | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.request, self.adapter, self.deliver, self.room = request, adapter, deliver, room
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.prediction, self.accepted = list(prediction), 0
        self.cached = 0
        """Tokens that the networks have seen."""
        self.previous: Tensor | None = None
        """The attached model's last hidden state (d,) that chose the last token, where a drafter reads it."""
        self.finish_reason: FinishReason | None = None
        self._ends = (frozenset[int]() if request.ignore_eos else ends) | frozenset(request.stop_tokens)
        self._follower = follower
        self._tokenizer, self._wording = tokenizer, Wording(tokenizer, request.stop, request.min_tokens)
        self._text, self._told = "", list[Token]()
        self._processors = processors(request.sampling, len(prompt), generation)
        self._source = generator(request.sampling, device)
        self._late = sorted(end for end in self._ends | ends) if request.min_tokens else []
        self._plain = request.sampling.temperature == 0 and not self._processors and follower is None and not self._late

    @property
    def begun(self) -> bool:
        """Whether the answer has a token, and the prompt has therefore been read."""
        return len(self.tokens) > self.prompt_length

    @property
    def left(self) -> int:
        """Tokens that the answer may still get."""
        return self.room - len(self.tokens)

    def owed(self, limit: int) -> tuple[list[int], list[int] | None]:
        """Return what is to be read of the prompt next, at most ``limit`` tokens, and the tokens expected behind it.

        They are None while more of the prompt is to come. A prediction is read whole with the end of the prompt.
        """
        part = self.tokens[self.cached : min(self.cached + limit, self.prompt_length)]
        if self.cached + len(part) < self.prompt_length:
            return part, None
        expected = self.prediction[: self.left]
        return part + expected, expected

    def judge(self, logits: Logits, first: int, expected: Sequence[int]) -> int:
        """Say token after token as the model chooses them, for as long as the next expected token is the one chosen.

        The token at a place depends on logits and the row's own source of chance alone, which gives each place its
        own draw: what was expected changes how many tokens a pass gives, and never which.

        Args:
            logits: those of a pass.
            first: the place among them that is this row's last token; those of the expected tokens follow.
            expected: tokens that the networks have seen ahead.

        Returns:
            How many of the expected tokens stand.

        Raises:
            RequestError: if the logits are not finite, or no token may follow.
        """
        for place in range(len(expected) + 1):
            values, likeliest = logits[first + place]
            if not math.isfinite(values[likeliest]):  # the largest is NaN where any of them is
                raise RequestError("the model's logits are not finite: its weights or states hold NaN or infinity", 500)
            token = likeliest if self._plain else self._chosen(values)
            self._say(token, values)
            stands = place < len(expected) and token == expected[place]
            if self.finish_reason is not None or not stands:
                break
        self.cached = len(self.tokens) - 1
        return place + stands

    def piece(self) -> Piece | None:
        """Take what has come to stand since the last time; None if there is nothing to say."""
        said = len(self.tokens) - self.prompt_length
        usage, running = None, Usage(self.prompt_length, said)
        if self.finish_reason is not None:
            self._text += self._wording.end()
            usage = Usage(self.prompt_length, said, self.accepted, len(self.prediction) - self.accepted)
        if not (self._text or self._told or usage):
            return None
        piece = Piece(self._text, tuple(self._told), self.finish_reason, usage, running=running)
        self._text, self._told = "", []
        return piece

    def _chosen(self, values: Tensor) -> int:
        prefix: Any = torch.tensor([self.tokens], device=values.device)
        scores: Any = values if self._follower is None else self._follower.restrict(values)
        if len(self.tokens) - self.prompt_length < self.request.min_tokens:
            scores = scores.index_fill(0, torch.tensor(self._late, device=scores.device), -torch.inf)
        if scores.max() == -torch.inf:
            raise RequestError("no token may follow: the schema is complete before min_tokens", param="min_tokens")
        return choose(self._processors(prefix, scores[None])[0], self.request.sampling, self._source)

    def _say(self, token: int, values: Tensor) -> None:
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return
        if self._follower is not None:
            self._follower.advance(token)
        self._text += self._wording.add(token)
        if self.request.top_logprobs is not None:
            self._told.append(self._tell(token, values, self.request.top_logprobs))
        if self._wording.stopped or (self._follower is not None and self._follower.complete):
            self.finish_reason = "stop"
        elif self.left <= 0:
            self.finish_reason = "length"

    def _tell(self, token: int, values: Tensor, alternatives: int) -> Token:
        logprobs = values.log_softmax(-1)
        best = logprobs.topk(min(alternatives, len(logprobs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        told = tuple((other, self._by_itself(other), logprob) for other, logprob in top)
        return Token(token, self._by_itself(token), float(logprobs[token]), told)

    def _by_itself(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
