r"""Cross-entropy where there are labels, and the joint loss.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 8-9:  loss = CE(head(h_L), y) + lambda * CE(head(s_0), y); and, if
asked for, + mu * tau^2 KL(p_tau(h_L) || p_tau(s_0)), by which the detached shadow learns from the attached model.

Only positions whose next token is labelled reach a head: on text with 2 % of its tokens labelled, 98 % of the
vocabulary products would be thrown away.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.head import (
    IGNORE_INDEX,
    Head,
    HeadSums,
    at_least_float32,
    head_sums_reference,
    summed_cross_entropy,
)
from shadowtune.core.vocabulary_sweep import Sweep


class JointLoss(NamedTuple):
    """Scalars: ``total`` = ``base`` + lambda * ``shadow`` + mu * ``distillation``; None where the weights are 0."""

    total: Tensor
    base: Tensor
    shadow: Tensor | None
    distillation: Tensor | None = None


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
    return _share(total, (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


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
    initial_states: Tensor,
    labels: Tensor,
    shadow_loss_weight: float,
    num_items_in_batch: Tensor | int | None = None,
    distillation_weight: float = 0.0,
    temperature: float = 1.0,
) -> JointLoss:
    """Eq. 8-9 for causal language modelling, and the distillation of the attached model into the shadow.

    Args:
        head: the base's own.
        hidden_states: (B, T, d), the attached model's last hidden states, after the final norm.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        shadow_loss_weight: lambda.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
        distillation_weight: mu.
        temperature: tau.
    """
    targets, h, s = labelled_rows(labels, hidden_states, initial_states)
    count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    alone = shadow_loss_weight == 0 and distillation_weight == 0
    states = None if alone else s.to(h.dtype)  # the vocabulary's product is half of the cost: skip what is not trained
    sums = head_sums(head, h, states, targets, temperature if distillation_weight else None)
    base, shadow, distillation = (None if each is None else _share(each, count) for each in sums)
    assert base is not None
    total = base
    if shadow is not None and shadow_loss_weight:
        total = total + shadow_loss_weight * shadow
    if distillation is not None:
        total = total + distillation_weight * distillation
    return JointLoss(total, base, shadow, distillation)


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Loss of (B, C) class logits: squared error, cross-entropy or binary cross-entropy, as transformers chooses.

    Args:
        logits: (B, C).
        labels: (B,) integers for one class of C; numbers for regression; (B, C) zeros and ones for several classes.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None to tell by
            C and the dtype of the labels.
        num_items_in_batch: labels (B, or B * C) of the whole optimizer step; by default those of this call.

    Returns:
        A scalar: the mean over the labels.
    """
    if problem_type is None:
        whole = labels.dtype in (torch.long, torch.int)
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else problem_type
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    wide = at_least_float32(logits)
    if problem_type == "single_label_classification":
        total = F.cross_entropy(wide, labels.view(-1), reduction="sum")
    elif problem_type == "regression":
        total = F.mse_loss(wide, labels.to(wide.dtype).view_as(wide), reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
    return _share(total, count)


def _share(total: Tensor, count: Tensor | int) -> Tensor:
    """``total`` over ``count``; 0 of 0 is 0."""
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
