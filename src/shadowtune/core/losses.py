r"""Cross-entropy where there are labels, and the joint loss.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 8-9:  loss = CE(head(h_L), y) + lambda * CE(head(s_0), y).

Only positions whose next token is labelled reach a head: on text with 2 % of its tokens labelled, 98 % of the
vocabulary products would be thrown away.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.head_loss import IGNORE_INDEX, at_least_float32, head_cross_entropy, summed_cross_entropy


class JointLoss(NamedTuple):
    """Scalars: ``total`` = ``base`` + lambda * ``shadow``; the shadow's is None where lambda is 0."""

    total: Tensor
    base: Tensor
    shadow: Tensor | None


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


def joint_causal_loss(
    head: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    initial_states: Tensor,
    labels: Tensor,
    shadow_loss_weight: float,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    frozen_head: bool = True,
) -> JointLoss:
    """Eq. 8-9 for causal language modelling.

    Args:
        head: maps (N, d) to (N, V) logits; the base's own.
        hidden_states: (B, T, d), the attached model's last hidden states, after the final norm.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        shadow_loss_weight: lambda.
        vocab_size: V.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
        frozen_head: whether the head's weights want no gradient, so that (N, V) logits need never exist.
    """
    targets, h, s = labelled_rows(labels, hidden_states, initial_states)
    count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    base = _share(head_cross_entropy(head, h, targets, vocab_size, frozen_head), count)
    if shadow_loss_weight == 0:  # the product with the vocabulary is half of the cost: skip what is not trained
        return JointLoss(base, base, None)
    shadow = _share(head_cross_entropy(head, s.to(h.dtype), targets, vocab_size, frozen_head), count)
    return JointLoss(base + shadow_loss_weight * shadow, base, shadow)


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
