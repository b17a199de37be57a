"""Drafts of one shadow for those of its rows that want them, as long as they pay in the batch there is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.speculation.acceptance import Proposal
from shadowtune.model.speculation.decoding import draft_share
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


class Draft(NamedTuple):
    """What a shadow proposes."""

    tokens: list[list[int]]
    """Of each row, at most one fewer than the row has left."""
    states: Tensor
    """s0 (B, 1 + g, d) at the last token and at g drafts."""
    confidences: list[Tensor]
    """Of each place, (B,)."""
    looked: int
    """How often the drafter was asked."""


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

    def draft(self, rows: Sequence[Text], batch: int, run: Callable[[list[list[int]], int], Tensor]) -> Draft:
        """Draft for rows that have at least one token left.

        Args:
            rows: B.
            batch: rows of the verifying pass, these included: all of them pay for its length.
            run: the shadow's backbone: (the next tokens of each row, tokens that it has seen since ``cached``) -> s0.
        """
        length, drafter = self._length, self._drafter
        length.costs = Costs.of(self._device, self._share, batch)
        known = [row.previous for row in rows if row.previous is not None]
        drafter.learn(torch.stack(known) if len(known) == len(rows) else None)
        proposals: list[Proposal] = []
        drafted: list[list[int]] = [[] for _ in rows]
        waiting, states, looked = [[row.tokens[-1]] for row in rows], list[Tensor](), 0
        others = torch.zeros(batch - len(rows))
        standing = torch.cat([torch.ones(len(rows)), others])
        for _ in range(length.begin(max(row.left for row in rows) - 1)):
            if drafter.reads_states and waiting[0]:
                states.append(run(waiting, _width(states)))
                waiting = [[] for _ in rows]
            proposal = drafter.propose(
                lambda: [row.tokens + said for row, said in zip(rows, drafted, strict=True)],
                states[-1][:, -1] if states else None,
            )
            looked += 1
            if proposal is None:
                break
            chances = torch.cat([length.chance(proposal.confidence), others])
            if not length.worth(len(proposals), chances, standing):
                break
            standing = standing * chances
            proposals.append(proposal)
            for token, said, line in zip(proposal.tokens.tolist(), drafted, waiting, strict=True):
                said.append(token)
                line.append(token)
        if waiting[0]:
            states.append(run(waiting, _width(states)))
        tokens = [said[: max(0, row.left - 1)] for said, row in zip(drafted, rows, strict=True)]
        return Draft(tokens, torch.cat(states, 1), [proposal.confidence for proposal in proposals], looked)

    def learn(self, draft: Draft, accepted: Sequence[int], said: Sequence[int]) -> None:
        """Take in what became of a draft: of each row, how many tokens stood and how many it got."""
        self._length.learn(draft.confidences, accepted, sum(said) / len(said), draft.looked)


def _width(states: Sequence[Tensor]) -> int:
    return sum(part.shape[1] for part in states)
