"""Speculative decoding in batches: drafts of one adapter's shadow for its sequences, while they pay."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.speculation.decoding import draft_share
from shadowtune.model.speculation.draft import Draft, make_draft
from shadowtune.model.speculation.draft_length import Costs, DraftLength
from shadowtune.model.speculation.drafters import make_drafter


class SequenceState(Protocol):
    """What drafting and the shadow's backbone read of a sequence."""

    tokens: list[int]
    """Prompt and output so far."""
    cached: int
    """Number of tokens in the key-value caches."""
    max_length: int
    """Most tokens of prompt and output."""
    last_hidden: Tensor | None
    """The attached model's last hidden state (d,) that produced the last token."""

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""


class BatchDrafter:
    """Drafts for the sequences of one adapter, with a draft length adapted to measured acceptance.

    Drafts are greedy for sequences that sample, too: their next token does not depend on the draft.

    Args:
        model: the attached model.
        config: the settings.

    Raises:
        ConfigError: if the settings ask for a drafter that the model was not trained with.
    """

    def __init__(self, model: ShadowForCausalLM, config: SpeculationConfig) -> None:
        self._drafter = make_drafter(config, model, LogitsProcessorList(), sample=False)
        self._device, self._share = model.device.type, draft_share(model, config)
        costs = Costs.of(self._device, self._share, 1)
        self._length = DraftLength(costs, config.longest, config.length is not None)

    def draft(
        self,
        sequences: Sequence[SequenceState],
        batch: int,
        run_backbone: Callable[[list[list[int]], int], Tensor],
    ) -> tuple[Draft, list[list[int]]]:
        """Draft for sequences with at least one token left.

        Args:
            sequences: B.
            batch: sequences of the verifying pass, these included: all of them pay for its length.
            run_backbone: (next tokens of each sequence, tokens that it has processed since ``cached``) -> s0.

        Returns:
            The draft, and the drafted tokens of each sequence that fit its length.
        """
        self._length.costs = Costs.of(self._device, self._share, batch)
        hidden = [sequence.last_hidden for sequence in sequences if sequence.last_hidden is not None]
        self._drafter.learn(torch.stack(hidden) if len(hidden) == len(sequences) else None)
        draft = make_draft(
            self._drafter,
            self._length,
            max(sequence.remaining for sequence in sequences) - 1,
            torch.tensor([sequence.tokens[-1:] for sequence in sequences]),
            lambda: [sequence.tokens for sequence in sequences],
            lambda tokens, seen: run_backbone(tokens.tolist(), seen),
            counted=list(range(len(sequences))),
            others=batch - len(sequences),
        )
        pairs = zip(draft.tokens, sequences, strict=True)
        return draft, [tokens[: max(0, sequence.remaining - 1)] for tokens, sequence in pairs]

    def learn(self, draft: Draft, accepted: Sequence[int], gained: Sequence[int]) -> None:
        """Update the acceptance estimate: accepted drafts and generated tokens of each sequence."""
        confidences = [proposal.confidence for proposal in draft.proposals]
        self._length.learn(confidences, accepted, sum(gained) / len(gained), draft.looked)
