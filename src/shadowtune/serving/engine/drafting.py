"""Speculative decoding in batches: drafts of one adapter's shadow for its sequences, while they pay."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.speculation.decoding import draft_share
from shadowtune.model.speculation.draft_length import Costs, DraftLength
from shadowtune.model.speculation.drafters import AdaptiveDrafter, DraftBatch, make_drafter


class SequenceState(Protocol):
    """State of a sequence that drafting and the shadow's backbone read."""

    tokens: list[int]
    """Prompt and output so far."""
    cached: int
    """Number of tokens in the key-value caches."""
    max_length: int
    """Most tokens of prompt and output."""
    last_hidden: Tensor | None
    """The attached model's draft features (n,) where the last token was chosen."""

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
        self._device, self._share = model.device.type, draft_share(model, config)
        costs = Costs.of(self._device, self._share, 1)
        length = DraftLength(costs, config.longest, config.length is not None)
        self._drafter = AdaptiveDrafter(make_drafter(config, model, LogitsProcessorList(), sample=False), length)

    def draft(
        self,
        sequences: Sequence[SequenceState],
        batch: int,
        run_backbone: Callable[[list[list[int]], int], Tensor],
    ) -> tuple[DraftBatch, list[list[int]]]:
        """Draft for sequences with at least one token left.

        Args:
            sequences: B.
            batch: sequences of the verifying pass, these included: all of them pay for its length.
            run_backbone: (next tokens of each sequence, tokens that it has processed since ``cached``) -> s0.

        Returns:
            The draft, and the drafted tokens of each sequence that fit its length.
        """
        self._drafter.length.costs = Costs.of(self._device, self._share, batch)
        hidden = [sequence.last_hidden for sequence in sequences if sequence.last_hidden is not None]
        self._drafter.drafter.learn(torch.stack(hidden) if len(hidden) == len(sequences) else None)
        draft = self._drafter.draft(
            torch.tensor([sequence.tokens[-1:] for sequence in sequences]),
            lambda: [sequence.tokens for sequence in sequences],
            lambda tokens, seen: run_backbone(tokens.tolist(), seen),
            max(sequence.remaining for sequence in sequences) - 1,
            counted=list(range(len(sequences))),
            others=batch - len(sequences),
        )
        pairs = zip(draft.tokens, sequences, strict=True)
        return draft, [tokens[: max(0, sequence.remaining - 1)] for tokens, sequence in pairs]

    def learn(self, draft: DraftBatch, accepted: Sequence[int], gained: Sequence[int]) -> None:
        """Update the acceptance estimate: accepted drafts and generated tokens of each sequence."""
        self._drafter.learn(draft, accepted, gained)
