"""Drafters: they propose the next tokens before the attached model has computed them.

A draft is made token after token for as long as ``DraftLength`` expects the next one to save time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.draft_head import DraftContext, DraftHead, DraftVocabulary
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.draft_length import DraftLength
from shadowtune.model.speculation.verification import Proposal

WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
)
"""Processors that depend on scores alone, not on token ids; drafts are drawn through them too."""
LONGEST_MATCH, SHORTEST_MATCH = 8, 1
"""Tokens that must equal an earlier part of the text for "ngram" to continue from there."""


class Drafter(Protocol):
    """Proposes tokens one after the other, for B sequences."""

    reads_states: bool
    """Whether ``propose`` needs s0 of the last token."""

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal | None:
        """Propose the next token of each sequence, or None.

        Args:
            texts: returns the tokens of each sequence so far, drafts included.
            states: s0 (B, d) at the last of them, where it is known.
        """

    def learn(self, hidden_states: Tensor | None) -> None:
        """Receive ``draft_features`` (B, n) of the attached model at the positions that chose the last tokens."""


class ShadowDrafter:
    """The detached shadow: the base's head on s0, or its rows of frequent tokens alone.

    Args:
        head: the base's.
        vocabulary: (K,) tokens to choose from; None chooses from all, as does a head whose weight is not known.
        warpers: processors of the scores when sampling; None drafts the likeliest token.
        draft_head: draft head that joins s0 with the attached model's hidden states; None drafts from s0 alone.
        branches: tokens at each position, of which one is the draft and the others its alternatives.
    """

    reads_states = True

    def __init__(
        self,
        head: Head,
        vocabulary: Tensor | None,
        warpers: LogitsProcessorList | None,
        draft_head: DraftHead | None = None,
        branches: int = 1,
    ) -> None:
        self._draft_head, self._branches = draft_head, branches
        self._context: DraftContext | None = None
        self._warpers: Callable[[Any, Tensor], Tensor] | None = warpers
        self._vocabulary = DraftVocabulary(head, vocabulary)

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal:
        """Propose a token from s0."""
        assert states is not None
        if self._context is not None:
            assert self._draft_head is not None
            self._context = self._draft_head(states, self._context)
            states = self._context.previous
        scores = self._vocabulary.head.apply(states).float()
        if self._warpers is None:
            top = scores.max(-1)
            confidence = (top.values - scores.logsumexp(-1)).exp()
            others = self._alternatives(scores, top.indices)
            return Proposal(self._vocabulary.token_ids(top.indices), confidence, alternatives=others)
        empty = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        q = self._warpers(empty, scores).softmax(-1)
        columns = torch.multinomial(q, 1)[:, 0]
        others = self._alternatives(scores, columns)
        return Proposal(
            self._vocabulary.token_ids(columns), q.amax(-1), q, self._vocabulary.tokens, alternatives=others
        )

    def _alternatives(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        """Return the likeliest tokens (B, branches - 1) but the chosen columns; None for a chain."""
        count = min(self._branches, scores.shape[1]) - 1
        if count == 0:
            return None
        return self._vocabulary.token_ids(scores.scatter(1, chosen[:, None], -torch.inf).topk(count).indices)

    def learn(self, hidden_states: Tensor | None) -> None:
        """Start the next draft from these states."""
        self._context = None
        if self._draft_head is not None and hidden_states is not None:
            self._context = self._draft_head.begin(hidden_states)


class NgramDrafter:
    """The token that followed the last tokens where they occur earlier in the same text, prompt included."""

    reads_states = False

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal | None:
        """Propose a token of the text itself; sequences without a match get token 0 and confidence 0."""
        found = [_continuation(text) for text in texts()]
        if not any(length for _, length in found):
            return None
        tokens = torch.tensor([token for token, _ in found])
        return Proposal(tokens, torch.tensor([length / (length + 1) for _, length in found]))

    def learn(self, hidden_states: Tensor | None) -> None:
        """Do nothing: the proposals depend on the text alone."""


class CombinedDrafter:
    """``NgramDrafter`` where it is more confident than the shadow, else the shadow."""

    reads_states = True

    def __init__(self, shadow: ShadowDrafter) -> None:
        self._shadow, self._ngram = shadow, NgramDrafter()

    def propose(self, texts: Callable[[], Sequence[list[int]]], states: Tensor | None) -> Proposal:
        """Propose the token of the more confident drafter, for each sequence."""
        shadow, ngram = self._shadow.propose(texts, states), self._ngram.propose(texts, states)
        if ngram is None:
            return shadow
        device = shadow.tokens.device
        confidence = ngram.confidence.to(device)
        better = confidence > shadow.confidence
        others = shadow.alternatives
        if others is not None:  # the shadow's own draft is the first alternative to that of the text
            own = torch.cat([shadow.tokens[:, None], others[:, :-1]], 1)
            others = torch.where(better[:, None], own, others)
        return Proposal(
            torch.where(better, ngram.tokens.to(device), shadow.tokens),
            torch.where(better, confidence, shadow.confidence),
            shadow.probabilities,
            shadow.vocabulary,
            ~better,
            others,
        )

    def learn(self, hidden_states: Tensor | None) -> None:
        """Pass the states to the shadow."""
        self._shadow.learn(hidden_states)


def make_drafter(
    config: SpeculationConfig, model: Any, processors: LogitsProcessorList, sample: bool, branches: int = 1
) -> Drafter:
    """Make the drafter of one call of ``generate``.

    Args:
        config: the settings.
        model: the attached model.
        processors: those of the call.
        sample: whether tokens are drawn.
        branches: tokens at each position, the alternatives of a draft included.

    Raises:
        ConfigError: if the settings ask for "draft_head" and it was not trained.
    """
    if config.drafter == "ngram":
        return NgramDrafter()
    warpers = LogitsProcessorList(each for each in processors if isinstance(each, WARPERS)) if sample else None
    vocabulary = model.draft_vocabulary if config.draft_vocabulary else None
    draft_head = None if config.drafter == "shadow" else model.shadow.draft_head
    if config.drafter == "draft_head" and draft_head is None:
        raise ConfigError("drafter draft_head needs a shadow that was trained with draft_rank; choose shadow")
    shadow = ShadowDrafter(model.head, vocabulary, warpers, draft_head, branches)
    return CombinedDrafter(shadow) if config.drafter == "combined" else shadow


def _continuation(text: list[int]) -> tuple[int, int]:
    """Return the token after the latest of the longest matches, and the match's length; (0, 0) without a match.

    The tokens are searched as the characters of a string, which is ten times as fast as searching a list.
    """
    characters = "".join(map(chr, text))
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        start = characters.rfind(characters[-length:], 0, -1)
        if start >= 0:
            return text[start + length], length
    return 0, 0


class DraftBatch(NamedTuple):
    """The drafts of B sequences."""

    proposals: list[Proposal]
    """g of them."""
    states: Tensor
    """s0 (B, 1 + g, d) at the last token of each sequence and at its drafts."""
    confidences: list[Tensor]
    """Of each proposal, (n,), for the sequences that decide on the draft length."""
    attempts: int
    """How often the drafter was called."""

    @property
    def tokens(self) -> list[list[int]]:
        """The drafted tokens of each sequence."""
        return _by_sequence(self.proposals, len(self.states))


class AdaptiveDrafter:
    """A drafter, and the rule for how many tokens it drafts.

    Args:
        drafter: proposes the tokens.
        length: decides after each token whether another one is worth it.
    """

    def __init__(self, drafter: Drafter, length: DraftLength) -> None:
        self.drafter, self.length = drafter, length

    def draft(
        self,
        last: Tensor,
        texts: Callable[[], Sequence[list[int]]],
        run: Callable[[Tensor, int], Tensor],
        room: int,
        *,
        counted: Sequence[int],
        others: int = 0,
        settle: Callable[[Tensor], Tensor] = Tensor.cpu,
    ) -> DraftBatch:
        """Draft for the sequences of a batch.

        Args:
            last: (B, 1) tokens that were emitted and that no network has read yet.
            texts: returns the tokens of each sequence, ``last`` included.
            run: the shadow's backbone: ((B, n) tokens, how many it has read of this draft) -> s0 (B, n, d).
            room: maximum number of tokens to draft.
            counted: indices of the sequences that decide on the length.
            others: further sequences of the verifying pass, which share its cost and get no drafts.
            settle: makes the final tokens of the proposed ones (B,), on the device of ``last``.
        """
        proposals, states, unread = list[Proposal](), list[Tensor](), [last]
        confidences, nothing, attempts = list[Tensor](), torch.zeros(others), 0
        survival = torch.cat([torch.ones(len(counted)), nothing])

        def read() -> None:
            states.append(run(torch.cat(unread, 1), sum(part.shape[1] for part in states)))
            unread.clear()

        for _ in range(self.length.begin(room)):
            if self.drafter.reads_states and unread:
                read()
            proposal = self.drafter.propose(
                lambda: [text + ids for text, ids in zip(texts(), _by_sequence(proposals, len(last)), strict=True)],
                states[-1][:, -1] if states else None,
            )
            attempts += 1
            if proposal is None:
                break
            confidence = proposal.confidence[counted]
            chances = torch.cat([self.length.chance(confidence), nothing])
            if not self.length.worth(len(proposals), chances, survival):
                break
            survival = survival * chances
            settled = settle(proposal.tokens)
            proposals.append(proposal._replace(tokens=settled))
            confidences.append(confidence)
            unread.append(settled[:, None])
        if unread:
            read()
        return DraftBatch(proposals, torch.cat(states, 1), confidences, attempts)

    def learn(self, draft: DraftBatch, accepted: Sequence[int], emitted: Sequence[int]) -> None:
        """Update the length rule by the accepted drafts and the emitted tokens of each counted sequence."""
        self.length.learn(draft.confidences, accepted, sum(emitted) / len(emitted), draft.attempts)


def _by_sequence(proposals: Sequence[Proposal], count: int) -> list[list[int]]:
    if not proposals:
        return [[] for _ in range(count)]
    drafted: list[list[int]] = torch.stack([proposal.tokens for proposal in proposals], 1).tolist()
    return drafted
