"""Training objectives, one function per kind of model; every head runs at labelled positions only.

All have the signature ``objective(model, inputs, num_items_in_batch) -> {"loss": scalar, ...}``. ``inputs`` is a batch
with labels. ``num_items_in_batch`` counts the labels of the whole optimizer step, over its micro-batches and processes;
losses are sums divided by it, so they add up to the loss of one large batch. None divides by this batch's own count.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shadowtune.core.losses import IGNORE_INDEX, classification_loss, token_cross_entropy

TERMS = ("loss", "base_loss", "shadow_loss", "distillation_loss", "matching_loss", "draft_loss")
"""Fields of the joint losses; those that are None are left out."""
Objective = Callable[[nn.Module, dict[str, Any], Tensor | int | None], dict[str, Tensor]]
"""Signature of the functions below."""


def joint_causal_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """Joint loss of a ``ShadowForCausalLM``, with its two terms (Eq. 8-9)."""
    return _joint(model(**inputs, logits_to_keep=1, num_items_in_batch=num_items_in_batch))


def joint_class_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """Joint loss of a ``ShadowForSequenceClassification``, with its two terms."""
    return _joint(model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch))


def causal_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """Cross-entropy of a plain causal language model (lora, dora, full)."""
    return {"loss": causal_loss(model, inputs, num_items_in_batch)}


def class_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """Loss of a plain sequence classifier (lora, dora, full).

    The model's own ``loss`` is not used: transformers averages it over each micro-batch, whatever the step's count is.
    """
    inputs = dict(inputs)
    labels, weights = inputs.pop("labels"), inputs.pop("example_weights", None)
    logits = model(**inputs, use_cache=False).logits
    return {"loss": classification_loss(logits, labels, None, num_items_in_batch, weights)}


def own_causal_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """The model's own loss, with the terms that its adapters add to it (PEFT's Shadow tuner, AdaLoRA).

    Such a term is a mean over this batch, whatever the step's count is; with several batches a step it weighs more.
    """
    return {"loss": model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss}


def own_class_objective(
    model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """The classifier's own loss, a mean over this batch, weighted by its fraction of the step's examples."""
    count = inputs["labels"].numel()
    fraction = count / (count if num_items_in_batch is None else num_items_in_batch)
    return {"loss": model(**inputs, use_cache=False).loss * fraction}


def causal_loss(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy of any causal language model's logits, a scalar.

    The model computes logits at those positions that have a label in some sequence of the batch, for prompts and
    completions a small part of them. ``inputs`` holds ``input_ids``, ``labels`` and ``attention_mask``, each (B, T);
    packed sequences have ``position_ids`` instead of a mask. ``shift_labels`` (B, T) beside ``labels`` replace them and
    are not shifted: in context parallelism a position's next label may be another process's.
    """
    inputs = dict(inputs)
    labels, targets = inputs.pop("labels"), inputs.pop("shift_labels", None)
    if targets is None:
        targets = labels[:, 1:]
    kept = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    targets = targets[:, kept].reshape(-1)
    return token_cross_entropy(logits.flatten(0, 1), targets, num_items_in_batch)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(tensor.detach()).all())


def _joint(outputs: Any) -> dict[str, Tensor]:
    terms = {name: outputs.get(name) for name in TERMS}
    return {name: term for name, term in terms.items() if term is not None}  # lambda 0 has no shadow_loss
