r"""Cross-entropy where there are labels, and the joint loss.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 8-9:  loss = CE(head(h_L), y) + lambda * CE(head(s_0), y); and, if
asked for, + mu * tau^2 KL(p_tau(h_L) || p_tau(s_0)) + nu * |s_0 - h_L|^2 / |h_L|^2, by which the detached shadow learns
from the attached model. h_L is constant in both. Alone, without CE(head(h_L), y), the shadow learns from the bare base.

Only positions whose next token is labelled reach a head: on text with 2 % of its tokens labelled, 98 % of the
vocabulary products would be thrown away.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from shadowtune.core.head import (
    IGNORE_INDEX,
    Head,
    HeadSums,
    at_least_float32,
    head_sums_reference,
    summed_cross_entropy,
)
from shadowtune.core.top_tokens import TopTokens, top_divergence, top_tokens
from shadowtune.core.vocabulary_sweep import Sweep


class LossWeights(NamedTuple):
    """Weights of the shadow's terms; a term of weight 0 is not computed."""

    shadow: float
    """lambda."""
    distillation: float = 0.0
    """mu."""
    temperature: float = 1.0
    """tau."""
    matching: float = 0.0
    """nu."""
    top_k: int | None = None
    """How many of the teacher's most likely tokens the distillation looks at; None: all."""

    @property
    def teach(self) -> bool:
        """Whether the shadow learns from another model."""
        return self.distillation > 0 or self.matching > 0


class JointLoss(NamedTuple):
    """Scalars: ``total`` = ``base`` + lambda ``shadow`` + mu ``distillation`` + nu ``matching`` + ``draft``.

    A term is None where nothing needs it.
    """

    total: Tensor
    base: Tensor | None
    shadow: Tensor | None
    distillation: Tensor | None = None
    matching: Tensor | None = None
    draft: Tensor | None = None


def labelled_rows(labels: Tensor, *hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Shift by one and keep the rows whose next token is labelled.

    Args:
        labels: (B, T) token ids, IGNORE_INDEX where nothing is to be predicted.
        hidden_states: any number of (B, T, d) tensors.

    Returns:
        The N targets, then for each tensor its N rows (N, d). While torch compiles, all B * (T - 1) rows stay, the
        unlabelled ones with target IGNORE_INDEX: their number must not depend on the data then.
    """
    targets = labels[:, 1:].reshape(-1)
    rows = [hidden[:, :-1].reshape(-1, hidden.shape[-1]) for hidden in hidden_states]
    if torch.compiler.is_compiling():
        return (targets, *rows)
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return (targets[kept], *(row[kept] for row in rows))


def token_cross_entropy(logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of (N, V) logits against (N,) targets, at least in float32, summed, over the number of items.

    Args:
        num_items_in_batch: labelled tokens of the whole optimizer step, over all its micro-batches and processes; by
            default those of this call. Both terms of the joint loss use it, so lambda keeps its meaning under
            gradient accumulation.

    Returns:
        A scalar; exactly zero, with a gradient of zero, when no position is labelled.
    """
    total = summed_cross_entropy(logits, targets)
    return share(total, (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


def head_sums(head: Head, h: Tensor, s: Tensor | None, targets: Tensor, temperature: float | None = None) -> HeadSums:
    """Compute the losses of both networks behind one head.

    Args:
        head: the base's. If its weight is known, one sweep over the vocabulary does it (``vocabulary_sweep.py``);
            otherwise, and while torch compiles, all logits are made and autograd sees them.
        h: (N, d), the attached model's last hidden states.
        s: (N, d), the shadow's; None where it has no loss.
        targets: (N,), IGNORE_INDEX where there is no loss.
        temperature: of the divergence, which is left out if None.

    Returns:
        The sums. Second derivatives are not available where the weight is known.
    """
    if head.weight is None or torch.compiler.is_compiling():
        return head_sums_reference(head, h, s, targets, temperature)
    return HeadSums(*Sweep.apply(head, h, s, targets, temperature))


def joint_causal_loss(
    head: Head,
    hidden_states: Tensor,
    initial_states: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None = None,
) -> JointLoss:
    """Eq. 8-9 for causal language modelling, and what the detached shadow learns from the attached model.

    Args:
        head: the base's own.
        hidden_states: (B, T, d), the attached model's last hidden states, after the final norm.
        initial_states: s0, (B, T, d); None if all weights of the shadow's terms are 0.
        labels: (B, T), unshifted.
        weights: of the shadow's terms.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
    """
    if initial_states is None:
        assert not (weights.shadow or weights.teach)
        targets, h = labelled_rows(labels, hidden_states)
        base = head_sums(head, h, None, targets).base
        return _mean_terms(base, None, None, h, h, targets, weights, num_items_in_batch)
    targets, h, s = labelled_rows(labels, hidden_states, initial_states)
    alone = weights.shadow == weights.distillation == 0
    states = None if alone else s.to(h.dtype)  # the vocabulary's product is half of the cost: skip what is not trained
    whole = weights.distillation > 0 and weights.top_k is None
    base, shadow, divergence = head_sums(head, h, states, targets, weights.temperature if whole else None)
    if states is not None and weights.distillation and weights.top_k is not None:
        top = top_tokens(head, h, weights.top_k, weights.temperature)
        divergence = top_divergence(head, states, targets, top, weights.temperature, shadow)
    return _mean_terms(base, shadow, divergence, s, h, targets, weights, num_items_in_batch)


def detached_causal_loss(
    head: Head,
    initial_states: Tensor,
    labels: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None = None,
    teacher: Tensor | TopTokens | None = None,
) -> JointLoss:
    """What the shadow learns alone: from the text, and from a teacher that it does not run beside.

    Args:
        head: the base's own.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        weights: of the shadow's terms; those of a teacher that is not there must be 0.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
        teacher: its last hidden states (B, T, d), or its most likely tokens (B, T, k), which have nothing to match.
    """
    given = (teacher,) if isinstance(teacher, Tensor) else teacher or ()
    targets, s, *rows = labelled_rows(labels, initial_states, *given)
    h = rows[0] if isinstance(teacher, Tensor) else None
    shadow = divergence = None
    if weights.distillation and h is not None and weights.top_k is None:
        _, shadow, divergence = head_sums(head, h, s.to(h.dtype), targets, weights.temperature)
    elif weights.shadow or weights.distillation:
        shadow = head_sums(head, s, None, targets).base
    if weights.distillation and divergence is None:
        k = cast(int, weights.top_k)
        top = TopTokens(*rows) if h is None else top_tokens(head, h, k, weights.temperature)
        divergence = top_divergence(head, s, targets, top, weights.temperature, shadow)
    return _mean_terms(None, shadow, divergence, s, h, targets, weights, num_items_in_batch)


def _mean_terms(
    base: Tensor | None,
    shadow: Tensor | None,
    divergence: Tensor | None,
    s: Tensor,
    h: Tensor | None,
    targets: Tensor,
    weights: LossWeights,
    num_items_in_batch: Tensor | int | None,
) -> JointLoss:
    """Divide sums over the labelled rows by their number, and measure how far the rows s are from h, both (N, d)."""
    kept = targets != IGNORE_INDEX
    count = kept.sum() if num_items_in_batch is None else num_items_in_batch
    matching = None
    if weights.matching:
        assert h is not None
        matching = relative_squared_error(s, h.detach(), kept)
    base, shadow, divergence, matching = (
        None if each is None else share(each, count) for each in (base, shadow, divergence, matching)
    )
    return JointLoss(joined(base, shadow, divergence, matching, weights), base, shadow, divergence, matching)


def relative_squared_error(states: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    """Sum over the kept rows of |s - h|^2 / |h|^2, for states and targets (N, d) and ``kept`` (N,)."""
    wide, aim = at_least_float32(states), at_least_float32(targets)
    each = (wide - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=torch.finfo(aim.dtype).tiny)
    return (each * kept).sum()


def joined(
    base: Tensor | None,
    shadow: Tensor | None,
    distillation: Tensor | None,
    matching: Tensor | None,
    weights: LossWeights,
) -> Tensor:
    """Add up the terms that are there, at least one, each with its weight."""
    terms = ((1, base), (weights.shadow, shadow), (weights.distillation, distillation), (weights.matching, matching))
    first, *others = (term if weight == 1 else weight * term for weight, term in terms if term is not None and weight)
    return sum(others, first)


def share(total: Tensor, count: Tensor | int) -> Tensor:
    """``total`` over ``count``; 0 of 0 is 0."""
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
