r"""Losses of class logits, and the joint loss of the two classifiers (Eq. 8-9, https://arxiv.org/abs/2604.19254)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.head import at_least_float32
from shadowtune.core.losses import JointLoss, LossWeights, joined, relative_squared_error, share


def joint_classification_loss(
    logits: Tensor,
    shadow_logits: Tensor | None,
    hidden_states: Tensor,
    initial_states: Tensor | None,
    labels: Tensor,
    weights: LossWeights,
    problem_type: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> JointLoss:
    """Eq. 8-9 for classification, and what the detached shadow learns from the attached model.

    Args:
        logits: (B, C), of the attached model.
        shadow_logits: (B, C), of the shadow; None if all weights of its terms are 0.
        hidden_states: (B, d), what the logits were made of.
        initial_states: (B, d), what the shadow's logits were made of; None likewise.
        labels: as in ``classification_loss``.
        weights: of the shadow's terms.
        problem_type: as in ``classification_loss``.
        num_items_in_batch: as there.

    Where several classes or numbers are predicted, the distillation is the squared difference of the logits.
    """
    base = classification_loss(logits, labels, problem_type, num_items_in_batch)
    if shadow_logits is None or initial_states is None:
        assert not (weights.shadow or weights.teach)
        return JointLoss(base, base, None)
    shadow = classification_loss(shadow_logits, labels, problem_type, num_items_in_batch)
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    distillation = matching = None
    if weights.distillation:
        teacher, student = at_least_float32(logits.detach()), at_least_float32(shadow_logits)
        if problem_type_of(logits, labels, problem_type) == "single_label_classification":
            p, q = (F.log_softmax(x / weights.temperature, -1) for x in (teacher, student))
            total = weights.temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)
        else:
            total = F.mse_loss(student, teacher, reduction="sum")
        distillation = share(total, count)
    if weights.matching:
        everywhere = torch.ones_like(hidden_states[:, 0], dtype=torch.bool)
        matching = share(relative_squared_error(initial_states, hidden_states.detach(), everywhere), len(hidden_states))
    return JointLoss(joined(base, shadow, distillation, matching, weights), base, shadow, distillation, matching)


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
    problem_type = problem_type_of(logits, labels, problem_type)
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    wide = at_least_float32(logits)
    if problem_type == "single_label_classification":
        total = F.cross_entropy(wide, labels.view(-1), reduction="sum")
    elif problem_type == "regression":
        total = F.mse_loss(wide, labels.to(wide.dtype).view_as(wide), reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
    return share(total, count)


def problem_type_of(logits: Tensor, labels: Tensor, problem_type: str | None) -> str:
    """Tell by C and the dtype of the labels what is predicted, unless it is given."""
    if problem_type is not None:
        return problem_type
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if whole else "multi_label_classification"
