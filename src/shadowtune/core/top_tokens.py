r"""Distillation from the k most likely tokens of a teacher instead of from its whole vocabulary.

The teacher's distribution at temperature tau is cut to its k most likely tokens and made to sum to 1 again: p. The
student, with logits b, has q = softmax(b / tau). The divergence needs the student's cross-entropy against one token y,
whichever it is, and its logits at the k tokens, since  log q_j = log q_y + (b_j - b_y) / tau:

    KL(p, q) = sum_j p_j log p_j  +  CE(q, y)  +  (b_y - sum_j p_j b_j) / tau

Behind a linear head the last term is s . (w_y - sum_j p_j w_j): one weighted bag of the head's rows. At tau = 1 the
cross-entropy against the label is there anyway, so the student needs no further product with the vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.head import IGNORE_INDEX, Head, at_least_float32
from shadowtune.core.vocabulary_sweep import Sweep, product_dtype

ROWS_AT_ONCE = 256
"""Rows whose logits ``top_tokens`` holds at a time: 256 MB in float32 for a vocabulary of 262,144."""


class TopTokens(NamedTuple):
    """The k most likely next tokens of a teacher."""

    tokens: Tensor
    """(..., k) int64, the most likely first."""
    log_probabilities: Tensor
    """(..., k), at least float32; their exponentials sum to 1 over k."""


@torch.no_grad()
def top_tokens(head: Head, rows: Tensor, k: int, temperature: float) -> TopTokens:
    """Find the teacher's most likely tokens, a few rows at a time; while torch compiles, all at once.

    Args:
        head: the base's.
        rows: (N, d), the teacher's last hidden states.
        k: at most the size of the vocabulary.
        temperature: tau.

    Returns:
        (N, k) of both.
    """
    size = max(1, len(rows)) if torch.compiler.is_compiling() else ROWS_AT_ONCE
    parts = [at_least_float32(head.apply(some)).topk(k) for some in rows.split(size)]
    logits, tokens = (torch.cat(each) for each in zip(*parts, strict=True))
    return TopTokens(tokens, F.log_softmax(logits / temperature, -1))


def top_divergence(
    head: Head, s: Tensor, targets: Tensor, top: TopTokens, temperature: float, cross_entropy: Tensor | None = None
) -> Tensor:
    """Compute temperature^2 KL(top || softmax of the logits of s over the temperature), summed over the labelled rows.

    Args:
        head: the base's. If its weight is known and nothing is done to its logits, it costs a bag of its rows, and at
            temperatures other than 1 a sweep over the vocabulary; otherwise, and while torch compiles, all logits.
        s: (N, d), the student's last hidden states.
        targets: (N,), IGNORE_INDEX where there is no loss.
        top: (N, k) of the teacher.
        temperature: tau, of both.
        cross_entropy: of s against the targets, a sum over the labelled rows, if it is known.

    Returns:
        A scalar, at least float32.
    """
    if head.weight is None or head.finish is not None or torch.compiler.is_compiling():
        return top_divergence_reference(head, s, targets, top, temperature)
    if cross_entropy is None or temperature != 1:
        tempered = head._replace(finish=lambda logits: logits / temperature)
        cross_entropy = Sweep.apply(tempered, s, None, targets, None)[0]
    x = s.to(product_dtype(head))
    labels = targets.clamp(min=0)
    chosen, places = top.tokens.unique(return_inverse=True)
    rows = at_least_float32(head.weight[chosen].to(x.dtype))  # as the sweep sees them, but summed in float32
    p = top.log_probabilities.exp().to(rows.dtype)
    aim = F.embedding_bag(places, rows, mode="sum", per_sample_weights=p)
    lead = (x * (at_least_float32(head.weight[labels].to(x.dtype)) - aim)).sum(-1)
    if head.bias is not None:
        lead = lead + head.bias[labels] - (p * head.bias[top.tokens]).sum(-1)
    each = (p * top.log_probabilities).sum(-1) + lead / temperature
    return temperature**2 * (cross_entropy + (each * (targets != IGNORE_INDEX)).sum())


def top_divergence_reference(head: Head, s: Tensor, targets: Tensor, top: TopTokens, temperature: float) -> Tensor:
    """Compute the divergence from all logits, by its definition; arguments as in ``top_divergence``."""
    log_q = F.log_softmax(at_least_float32(head.apply(s)) / temperature, -1).gather(-1, top.tokens)
    log_p = top.log_probabilities
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (each * (targets != IGNORE_INDEX)).sum()
