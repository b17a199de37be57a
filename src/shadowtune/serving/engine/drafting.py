"""Drafts of one shadow for those of its rows that want them, as long as they pay in the batch there is."""

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


class Text(Protocol):
    """What is known of a row's text."""

    tokens: list[int]
    """Prompt and answer so far."""
    cached: int
    """How many of them the networks have seen."""
    room: int
    """How many there may be."""
    previous: Tensor | None
    """The attached model's last hidden state (d,) that chose the last token."""

    @property
    def left(self) -> int:
        """Tokens that may still come."""


class Drafting:
    """The drafter of one attached model, and what it has learned of how often it is right.

    Drafts are the likeliest tokens, for rows that sample too: a row's next token does not depend on them then.

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
        self, rows: Sequence[Text], batch: int, run: Callable[[list[list[int]], int], Tensor]
    ) -> tuple[Draft, list[list[int]]]:
        """Draft for rows that have at least one token left.

        Args:
            rows: B.
            batch: rows of the verifying pass, these included: all of them pay for its length.
            run: the shadow's backbone: (the next tokens of each row, tokens that it has seen since ``cached``) -> s0.

        Returns:
            The draft, and of each row those of its tokens that fit behind the text.
        """
        self._length.costs = Costs.of(self._device, self._share, batch)
        known = [row.previous for row in rows if row.previous is not None]
        self._drafter.learn(torch.stack(known) if len(known) == len(rows) else None)
        draft = make_draft(
            self._drafter,
            self._length,
            max(row.left for row in rows) - 1,
            torch.tensor([row.tokens[-1:] for row in rows]),
            lambda: [row.tokens for row in rows],
            lambda tokens, seen: run(tokens.tolist(), seen),
            counted=list(range(len(rows))),
            others=batch - len(rows),
        )
        return draft, [said[: max(0, row.left - 1)] for said, row in zip(draft.tokens, rows, strict=True)]

    def learn(self, draft: Draft, accepted: Sequence[int], said: Sequence[int]) -> None:
        """Take in what became of a draft: of each row, how many tokens stood and how many it got."""
        confidences = [proposal.confidence for proposal in draft.proposals]
        self._length.learn(confidences, accepted, sum(said) / len(said), draft.looked)
