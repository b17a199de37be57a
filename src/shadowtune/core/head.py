"""A head of V logits, and the losses behind it with all logits at once: the slow and obvious way."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that carries no loss, as everywhere in transformers."""


class Head(NamedTuple):
    """A head of V logits."""

    apply: Callable[[Tensor], Tensor]
    """(..., d) -> (..., V)."""
    weight: Tensor | None = None
    """(V, d) of a linear head that wants no gradient; None if nothing but ``apply`` is known."""
    bias: Tensor | None = None
    """(V,)."""
    finish: Callable[[Tensor], Tensor] | None = None
    """What is done to each logit after the product, such as a softcap; part of ``apply``."""


class HeadSums(NamedTuple):
    """Sums over the labelled rows: scalars, at least float32."""

    base: Tensor
    """Cross-entropy of h."""
    shadow: Tensor | None
    """Cross-entropy of s; None without s."""
    divergence: Tensor | None
    """temperature^2 KL(softmax of h || softmax of s); its gradient goes to s alone. None unless asked for."""


def head_sums_reference(
    head: Head, h: Tensor, s: Tensor | None, targets: Tensor, temperature: float | None = None
) -> HeadSums:
    """Compute the losses by autograd; arguments as in ``head_sums``."""
    logits = at_least_float32(head.apply(h))
    base = summed_cross_entropy(logits, targets)
    if s is None:
        return HeadSums(base, None, None)
    shadow_logits = at_least_float32(head.apply(s))
    shadow = summed_cross_entropy(shadow_logits, targets)
    if temperature is None:
        return HeadSums(base, shadow, None)
    p, q = (F.log_softmax(x / temperature, -1) for x in (logits.detach(), shadow_logits))
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return HeadSums(base, shadow, temperature**2 * (each * (targets != IGNORE_INDEX)).sum())


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of (N, V) logits against (N,) targets, at least in float32."""
    return F.cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def at_least_float32(x: Tensor) -> Tensor:
    """Widen 16-bit numbers, leave float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
