r"""Verification of drafted tokens by the attached model's logits, and statistics of it.

Each token is chosen as plain decoding would choose it, so drafts change nothing in the output. Greedy: a draft is
accepted if it is the likeliest token. Sampling (the rejection sampler of Leviathan et al., 2023,
https://arxiv.org/abs/2211.17192, algorithm 1): a draft x from q is accepted with probability min(1, p(x) / q(x)); the
first rejected one is replaced by a token drawn from (p - q)_+, normalized. So each token is distributed as p.

A draft may be a tree: a chain of tokens with alternatives of each as leaves. The token that the chain ends with is
chosen as above, alternatives or not; if it is one of them, the pass has computed its logits, and gives one token more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Process = Callable[[Tensor, Tensor], Tensor]
"""Logits processors of one sequence: (1, n) tokens so far and (1, V) logits -> (1, V) scores."""


class Proposal(NamedTuple):
    """The next token of each of B sequences, as a drafter proposes it."""

    tokens: Tensor
    """(B,)."""
    confidence: Tensor
    """(B,), the drafter's probability of its likeliest token, between 0 and 1. It must not depend on the token that was
    drawn: the draft length depends on it, and samples would no longer be distributed as p."""
    probabilities: Tensor | None = None
    """q (B, K), which the tokens were drawn from; None if nothing was drawn."""
    vocabulary: Tensor | None = None
    """(K,) token ids of the columns of q; None for all in order."""
    drawn: Tensor | None = None
    """(B,) which sequences were drawn from q; None means all if there is a q."""
    alternatives: Tensor | None = None
    """(B, k), further likely tokens, verified beside the drafted one; None for none."""


class VerificationResult(NamedTuple):
    """The tokens that one verifying pass gives a sequence."""

    tokens: list[int]
    """The accepted drafts, and one more token that the model chose itself."""
    accepted: int
    """Number of accepted drafts of the chain."""
    branch: int | None = None
    """Which alternative of the first rejected draft was chosen; None for none of them."""


def verify_greedy(logits: Tensor, drafts: Tensor, alternatives: Tensor | None = None) -> list[VerificationResult]:
    """Accept drafts while they are the likeliest tokens; for sequences without logits processors.

    Args:
        logits: (B, g + 1 + g k, V), at the last token, each of the drafts, and the alternatives of each.
        drafts: (B, g).
        alternatives: (B, g, k); None for none.
    """
    chosen, length = logits.argmax(-1), drafts.shape[1]
    accepted = (chosen[:, :length] == drafts).long().cumprod(1).sum(1).tolist()
    results = []
    for index, (ids, count) in enumerate(zip(chosen.tolist(), accepted, strict=True)):
        result = VerificationResult(ids[: count + 1], count)
        if alternatives is not None and count < length:
            branch = _find(alternatives[index, count], ids[count])
            if branch is not None:
                node = leaf(length, alternatives.shape[2], count, branch)
                result = VerificationResult([*result.tokens, ids[node]], count, branch)
        results.append(result)
    return results


def leaf(length: int, alternatives: int, step: int, branch: int) -> int:
    """Return the index of an alternative in a pass over the last token, ``length`` drafts and their alternatives."""
    return 1 + length + step * alternatives + branch


def _find(alternatives: Tensor, token: int) -> int | None:
    known: list[int] = alternatives.tolist()
    return known.index(token) if token in known else None


def verify_sequence(
    tokens: Tensor,
    length: int,
    logits: Tensor,
    index: int,
    proposals: Sequence[Proposal],
    process: Process,
    sample: bool,
) -> VerificationResult:
    """Accept or reject the drafts of one sequence one by one, as plain decoding would choose.

    Args:
        tokens: (n,) the sequence and, from index ``length``, space for further tokens, which is written to. Tokens
            behind its end are chosen without those before them, for the caller drops them.
        length: tokens of the sequence so far.
        logits: (g + 1 + g k, V) of this sequence, float32, as in ``verify_greedy``.
        index: of the sequence in the proposals.
        proposals: g of them.
        process: the logits processors.
        sample: whether tokens are drawn, or the likeliest taken.
    """
    emitted: list[int] = []
    verify = _verify_sampled if sample else _verify_likeliest

    def choose(node: int, proposal: Proposal | None) -> bool:
        prefix = tokens[None, : length + len(emitted)]
        token, accepted = verify(process(prefix, logits[node : node + 1])[0], proposal, index)
        if length + len(emitted) < len(tokens):
            tokens[length + len(emitted)] = token
        emitted.append(token)
        return accepted

    for step, proposal in enumerate(proposals):
        if choose(step, proposal):
            continue
        if proposal.alternatives is None:
            return VerificationResult(emitted, step)
        others = proposal.alternatives[index]
        branch = _find(others, emitted[-1])
        if branch is not None:
            choose(leaf(len(proposals), len(others), step, branch), None)
        return VerificationResult(emitted, step, branch)
    choose(len(proposals), None)
    return VerificationResult(emitted, len(proposals))


def _verify_likeliest(scores: Tensor, proposal: Proposal | None, index: int) -> tuple[int, bool]:
    token = int(scores.argmax())
    return token, proposal is not None and token == int(proposal.tokens[index])


def _verify_sampled(scores: Tensor, proposal: Proposal | None, index: int) -> tuple[int, bool]:
    p = scores.softmax(-1)
    if proposal is None:
        return _draw(p), False
    draft = int(proposal.tokens[index])
    q = _draft_distribution(proposal, index, p)
    if float(torch.rand((), device=p.device)) * float(q[draft]) < float(p[draft]):
        return draft, True
    rest = (p - q).clamp_(min=0)
    return _draw(rest if float(rest.sum()) > 0 else p), False  # p = q but for rounding


def _draft_distribution(proposal: Proposal, index: int, like: Tensor) -> Tensor:
    """Return q (V,) that the draft of a sequence was drawn from; all on one token if it was not drawn."""
    drawn = proposal.probabilities is not None and (proposal.drawn is None or bool(proposal.drawn[index]))
    if not drawn:
        return torch.zeros_like(like).index_fill_(0, proposal.tokens[index : index + 1], 1.0)
    assert proposal.probabilities is not None
    q = proposal.probabilities[index].to(like.dtype)
    return q if proposal.vocabulary is None else torch.zeros_like(like).index_copy_(0, proposal.vocabulary, q)


def _draw(weights: Tensor) -> int:
    return int(torch.multinomial(weights, 1))


@dataclass
class SpeculationStatistics:
    """Sums over verifying passes; a pass over a batch of three sequences counts as three."""

    passes: int = 0
    """Verifying passes, without those over prompts."""
    emitted: int = 0
    """Tokens that the passes gave."""
    verified: list[int] = field(default_factory=list)
    """By index in the draft: how many drafts were verified there, which needs all before them to be accepted."""
    accepted: list[int] = field(default_factory=list)
    """By index in the draft: how many of them were accepted."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass, 1 without drafts; 0 if there was no pass."""
        return self.emitted / self.passes if self.passes else 0.0

    @property
    def acceptance_rates(self) -> list[float]:
        """By index in the draft: the share of verified drafts that were accepted."""
        return [count / total for count, total in zip(self.accepted, self.verified, strict=True) if total]

    def add(self, drafted: int, accepted: Sequence[int], emitted: Sequence[int]) -> None:
        """Count a pass.

        Args:
            drafted: tokens drafted for each sequence.
            accepted: number of accepted drafts of each running sequence.
            emitted: number of tokens that each of them got.
        """
        self.passes += len(accepted)
        self.emitted += sum(emitted)
        for counts in (self.verified, self.accepted):
            counts.extend([0] * (drafted - len(counts)))
        for index in range(drafted):
            self.verified[index] += sum(count >= index for count in accepted)
            self.accepted[index] += sum(count > index for count in accepted)
