"""Cross-entropy through a head of V logits, a few rows at a time, so that (N, V) never exists.

A frozen head needs no gradient, so the gradient of its input rows is all that the backward pass will ask for. It is
computed right after each chunk's loss, while the chunk's logits are there, and only it is kept: (N, d) instead of
several (N, V). The idea is that of https://arxiv.org/abs/2410.09009 and https://github.com/linkedin/Liger-Kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that carries no loss, as everywhere in transformers."""
CHUNK_ELEMENTS = 2**23
"""Logits of a chunk: 32 MB of float32, which stays near the processor, and enough rows to multiply well."""


def head_cross_entropy(
    head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, vocab_size: int, frozen: bool = True
) -> Tensor:
    """Sum of the cross-entropies of ``head(rows)`` against ``targets``, at least in float32.

    Args:
        head: maps (n, d) to (n, V) logits, row by row.
        rows: (N, d).
        targets: (N,), IGNORE_INDEX where there is no loss.
        vocab_size: V, which decides how many rows a chunk has.
        frozen: whether nothing but ``rows`` wants a gradient. If not, or while torch compiles, all logits are made
            at once and autograd sees them.

    Returns:
        A scalar. Its second derivative is not available where ``frozen``.
    """
    if not frozen or torch.compiler.is_compiling():
        return summed_cross_entropy(head(rows), targets)
    total: Tensor = _ChunkedSum.apply(head, rows, targets, max(1, CHUNK_ELEMENTS // vocab_size))
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor, size: int) -> Tensor:
        wanted = rows.requires_grad
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        gradient = torch.empty_like(rows) if wanted else None
        for start in range(0, rows.shape[0], size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                chunk = rows[part].detach().requires_grad_(wanted)
                loss = summed_cross_entropy(head(chunk), targets[part])
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None if gradient is None else gradient * gradients[0].to(gradient.dtype), None, None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of (N, V) logits against (N,) targets, at least in float32."""
    return F.cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def at_least_float32(x: Tensor) -> Tensor:
    """Widen 16-bit numbers, leave float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
