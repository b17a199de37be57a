r"""Which drafted tokens stand: token by token as plain decoding would choose, without changing what it says.

Greedy: a draft stands if it is what the model finds likeliest. Sampling (Leviathan et al., 2023,
https://arxiv.org/abs/2211.17192, algorithm 1): a draft x from q stands with probability min(1, p(x) / q(x)); the first
one that does not is replaced by a token drawn from (p - q)_+, normalized. So each token is distributed as p.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Process = Callable[[Tensor, Tensor], Tensor]
"""Logits processors of one row: (1, n) tokens so far and (1, V) logits -> (1, V) scores."""


class Proposal(NamedTuple):
    """The next token of each row, as a drafter proposes it."""

    tokens: Tensor
    """(B,)."""
    confidence: Tensor
    """(B,), how sure the drafter was, between 0 and 1, before it drew: what is drafted and how much may depend on this,
    never on the token drawn, or samples would no longer fall as p."""
    probabilities: Tensor | None = None
    """q (B, K), what the tokens were drawn from; None if nothing was drawn."""
    vocabulary: Tensor | None = None
    """(K,) the tokens that the columns of q stand for; None for all in order."""
    drawn: Tensor | None = None
    """(B,) which rows were drawn from q; None means all if there is a q."""


class Verdict(NamedTuple):
    """What became of a row's drafts."""

    tokens: list[int]
    """The drafts that stand, and one more that the model chose itself."""
    accepted: int
    """How many drafts stand."""


def greedy_verdicts(logits: Tensor, drafts: Tensor) -> list[Verdict]:
    """Accept what the model finds likeliest; for rows whose logits nothing processes.

    Args:
        logits: (B, g + 1, V), at the last token and each of the drafts.
        drafts: (B, g).
    """
    chosen = logits.argmax(-1)
    accepted = (chosen[:, :-1] == drafts).long().cumprod(1).sum(1).tolist()
    return [Verdict(row[: count + 1], count) for row, count in zip(chosen.tolist(), accepted, strict=True)]


def verdict(
    tokens: Tensor, length: int, logits: Tensor, row: int, proposals: Sequence[Proposal], process: Process, sample: bool
) -> Verdict:
    """Judge the drafts of one row one by one, as plain decoding would choose.

    Args:
        tokens: (n,) the row so far and behind it, from position ``length``, room that is written over.
        length: tokens of the row so far.
        logits: (g + 1, V) of this row, float32.
        row: its index in the proposals.
        proposals: g of them.
        process: the logits processors.
        sample: whether tokens are drawn, or the likeliest taken.
    """
    said: list[int] = []
    for index in range(len(logits)):
        prefix = tokens[None, : length + index]
        scores = process(prefix, logits[index : index + 1])[0]
        proposal = proposals[index] if index < len(proposals) else None
        token, stands = _sampled(scores, proposal, row) if sample else _likeliest(scores, proposal, row)
        said.append(token)
        if not stands:
            return Verdict(said, index)
        tokens[length + index] = token
    return Verdict(said, len(proposals))


def _likeliest(scores: Tensor, proposal: Proposal | None, row: int) -> tuple[int, bool]:
    token = int(scores.argmax())
    return token, proposal is not None and token == int(proposal.tokens[row])


def _sampled(scores: Tensor, proposal: Proposal | None, row: int) -> tuple[int, bool]:
    p = scores.softmax(-1)
    if proposal is None:
        return _draw(p), False
    draft = int(proposal.tokens[row])
    q = _draft_distribution(proposal, row, p)
    if float(torch.rand((), device=p.device)) * float(q[draft]) < float(p[draft]):
        return draft, True
    rest = (p - q).clamp_(min=0)
    return _draw(rest if float(rest.sum()) > 0 else p), False  # p = q but for rounding


def _draft_distribution(proposal: Proposal, row: int, like: Tensor) -> Tensor:
    """Q (V,) that the draft of a row was drawn from; all on one token if it was not drawn."""
    drawn = proposal.probabilities is not None and (proposal.drawn is None or bool(proposal.drawn[row]))
    if not drawn:
        return torch.zeros_like(like).index_fill_(0, proposal.tokens[row : row + 1], 1.0)
    assert proposal.probabilities is not None
    q = proposal.probabilities[row].to(like.dtype)
    return q if proposal.vocabulary is None else torch.zeros_like(like).index_copy_(0, proposal.vocabulary, q)


def _draw(weights: Tensor) -> int:
    return int(torch.multinomial(weights, 1))
