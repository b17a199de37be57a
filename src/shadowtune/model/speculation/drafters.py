"""Who proposes the next token before the attached model has seen it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.core.draft_head import DraftHead
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.acceptance import Proposal

WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)
"""Processors that look at scores alone and not at which tokens they belong to; drafts are drawn through them too."""
LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens that must agree with an earlier place of the text for "ngram" to go on from there."""


class Drafter(Protocol):
    """Proposes tokens one after the other."""

    reads_states: bool
    """Whether ``propose`` needs s0 of the token before."""

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal | None:
        """Propose the next token of each row, or nothing.

        Args:
            texts: gives the tokens of each row so far, drafts included.
            states: s0 (B, d) at the last of them, where it is known.
        """

    def learn(self, hidden_states: Tensor | None) -> None:
        """Take note of the attached model's last hidden states (B, d) that chose the rows' last tokens."""


class ShadowDrafter:
    """The detached shadow: the base's head on s0, or on its frequent tokens' rows alone.

    Args:
        head: the base's.
        vocabulary: (K,) tokens to choose from; None chooses from all, as does a head whose weight is not known.
        warpers: what sampling does to the scores; None drafts the likeliest token.
        fusion: joins s0 with what the attached model knew one token earlier; None drafts from s0 alone.
    """

    reads_states = True

    def __init__(
        self,
        head: Head,
        vocabulary: Tensor | None,
        warpers: LogitsProcessorList | None,
        fusion: DraftHead | None = None,
    ) -> None:
        self._head, self._fusion = head, fusion
        self._previous: Tensor | None = None
        self._warpers: Callable[[Any, Tensor], Tensor] | None = warpers
        self._vocabulary = None if head.weight is None else vocabulary
        if self._vocabulary is not None:
            assert head.weight is not None
            self._rows = head.weight[self._vocabulary]
            self._bias = None if head.bias is None else head.bias[self._vocabulary]

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal:
        """Propose a token from s0."""
        assert states is not None
        if self._fusion is not None and self._previous is not None:
            states = self._previous = self._fusion(states, self._previous)
        scores = self._scores(states).float()
        if self._warpers is None:
            top = scores.max(-1)
            confidence = (top.values - scores.logsumexp(-1)).exp()
            return Proposal(self._named(top.indices), confidence)
        empty = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        q = self._warpers(empty, scores).softmax(-1)
        return Proposal(self._named(torch.multinomial(q, 1)[:, 0]), q.amax(-1), q, self._vocabulary)

    def learn(self, hidden_states: Tensor | None) -> None:
        """Begin the next draft behind these states."""
        self._previous = hidden_states

    def _scores(self, states: Tensor) -> Tensor:
        if self._vocabulary is None:
            return self._head.apply(states)
        logits = torch.nn.functional.linear(states.to(self._rows.dtype), self._rows, self._bias)
        return logits if self._head.logits_transform is None else self._head.logits_transform(logits)

    def _named(self, columns: Tensor) -> Tensor:
        return columns if self._vocabulary is None else self._vocabulary[columns]


class NgramDrafter:
    """What followed the last tokens where they stood before in the same text, prompt included."""

    reads_states = False

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal | None:
        """Propose a token of the text itself; rows that have none get 0 and no confidence."""
        found = [_continuation(text) for text in texts()]
        if not any(length for _, length in found):
            return None
        tokens = torch.tensor([token for token, _ in found])
        return Proposal(tokens, torch.tensor([length / (length + 1) for _, length in found]))

    def learn(self, hidden_states: Tensor | None) -> None:
        """Nothing: the text says all."""


class CombinedDrafter:
    """The text itself where it knows what follows, and else the shadow."""

    reads_states = True

    def __init__(self, shadow: ShadowDrafter) -> None:
        self._shadow, self._ngram = shadow, NgramDrafter()

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal:
        """Propose a token, each row's from who is surer of it."""
        ours, theirs = self._shadow.propose(texts, states), self._ngram.propose(texts, states)
        if theirs is None:
            return ours
        device = ours.tokens.device
        known = theirs.confidence.to(device)
        better = known > ours.confidence
        return Proposal(
            torch.where(better, theirs.tokens.to(device), ours.tokens),
            torch.where(better, known, ours.confidence),
            ours.probabilities,
            ours.vocabulary,
            ~better,
        )

    def learn(self, hidden_states: Tensor | None) -> None:
        """Tell the shadow."""
        self._shadow.learn(hidden_states)


def make_drafter(config: SpeculationConfig, model: Any, processors: LogitsProcessorList, sample: bool) -> Drafter:
    """Make the drafter of one call of ``generate``.

    Args:
        config: the settings.
        model: the attached model.
        processors: those of the call.
        sample: whether tokens are drawn.

    Raises:
        ConfigError: if the settings ask for "feedback" and it was not trained.
    """
    if config.drafter == "ngram":
        return NgramDrafter()
    warpers = LogitsProcessorList(each for each in processors if isinstance(each, WARPERS)) if sample else None
    vocabulary = model.draft_vocabulary if config.draft_vocabulary else None
    fusion = None if config.drafter == "shadow" else model.shadow.draft_fusion
    if config.drafter == "feedback" and fusion is None:
        raise ConfigError("drafter feedback needs a shadow that was trained with draft_rank; choose shadow")
    shadow = ShadowDrafter(model.head, vocabulary, warpers, fusion)
    return CombinedDrafter(shadow) if config.drafter == "combined" else shadow


def _continuation(text: list[int]) -> tuple[int, int]:
    """Return what followed the latest place with the longest match, and the match's length; 0 if there is none.

    The tokens are searched as the characters of a string: ten times as fast as a list of them.
    """
    characters = "".join(map(chr, text))
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        start = characters.rfind(characters[-length:], 0, -1)
        if start >= 0:
            return text[start + length], length
    return 0, 0
