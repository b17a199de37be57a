"""One draft: token after token, as long as that is expected to pay."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shadowtune.model.speculation.acceptance import Proposal
from shadowtune.model.speculation.draft_length import DraftLength
from shadowtune.model.speculation.drafters import Drafter


class Draft(NamedTuple):
    """What a shadow proposes to B rows."""

    proposals: list[Proposal]
    """g of them."""
    states: Tensor
    """s0 (B, 1 + g, d) at the last token of each row and at its drafts."""
    looked: int
    """How often the drafter was asked."""

    @property
    def tokens(self) -> list[list[int]]:
        """What is proposed to each row."""
        return _by_row(self.proposals, len(self.states))


def make_draft(
    drafter: Drafter,
    length: DraftLength,
    room: int,
    last: Tensor,
    texts: Callable[[], Sequence[list[int]]],
    run: Callable[[Tensor, int], Tensor],
    *,
    counted: Sequence[int],
    others: int = 0,
    settle: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Draft:
    """Draft for the rows of a batch.

    Args:
        drafter: who proposes.
        length: how far that pays.
        room: tokens that may be drafted at most.
        last: (B, 1) tokens that were said, but are in no network yet.
        texts: gives the tokens of each row, ``last`` included.
        run: the shadow's backbone: ((B, n) tokens, how many it has seen of this draft) -> s0 (B, n, d).
        counted: rows that decide how far it pays.
        others: further rows of the verifying pass, which pay for its length and get nothing.
        settle: makes of proposed tokens (B,) those that count, on the device of ``last``.
    """
    proposals, states, waiting = list[Proposal](), list[Tensor](), [last]
    nothing = torch.zeros(others)
    standing, looked = torch.cat([torch.ones(len(counted)), nothing]), 0

    def read() -> None:
        states.append(run(torch.cat(waiting, 1), sum(part.shape[1] for part in states)))
        waiting.clear()

    for _ in range(length.begin(room)):
        if drafter.reads_states and waiting:
            read()
        proposal = drafter.propose(
            lambda: [text + said for text, said in zip(texts(), _by_row(proposals, len(last)), strict=True)],
            states[-1][:, -1] if states else None,
        )
        looked += 1
        if proposal is None:
            break
        chances = torch.cat([length.chance(proposal.confidence[counted]), nothing])
        if not length.worth(len(proposals), chances, standing):
            break
        standing = standing * chances
        settled = settle(proposal.tokens)
        proposals.append(proposal._replace(tokens=settled))
        waiting.append(settled[:, None])
    if waiting:
        read()
    return Draft(proposals, torch.cat(states, 1), looked)


def _by_row(proposals: Sequence[Proposal], rows: int) -> list[list[int]]:
    if not proposals:
        return [[] for _ in range(rows)]
    drafted: list[list[int]] = torch.stack([proposal.tokens for proposal in proposals], 1).tolist()
    return drafted
