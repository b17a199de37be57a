"""The loss of every method, computed at labelled positions only."""

from typing import Any

import torch
from torch import Tensor, nn

from shadowtune.core.losses import IGNORE_INDEX, token_cross_entropy


def causal_loss(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy of a plain causal language model (lora, dora, full), a scalar.

    The model computes logits at those positions of the sequence that have a label in some row, which for prompt and
    completion is a small part of them. ``inputs`` holds ``input_ids``, ``attention_mask`` and ``labels``, each (B, T).
    """
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    kept = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    targets = targets[:, kept].reshape(-1)
    return token_cross_entropy(logits.reshape(targets.shape[0], -1), targets, num_items_in_batch)


def is_finite(loss: Tensor) -> bool:
    """Whether the loss of a batch is a number one can train on."""
    return bool(torch.isfinite(loss.detach()).all())
