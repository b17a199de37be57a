"""The boundary on CUDA devices: Triton kernels as one autograd operation. Imported only where Triton is installed."""

from typing import Any

import torch
import triton
from torch import Tensor

from shadowtune.core.fused import EPSILON, FusedParameters
from shadowtune.core.triton_kernels import backward_tokens, backward_weights, forward

TOKENS = 32
"""Tokens of a program."""
WIDTH = 64
"""Entries of d that a program holds at a time."""
PARTS = 16
"""Parts into which the tokens are split when parameters' gradients are summed."""


def triton_boundary(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: FusedParameters,
    alpha: float,
    transform_mask: Tensor | None = None,
    injection_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross a boundary, as ``fused_boundary`` does: same arguments, same results, on a CUDA device."""
    crossed: tuple[Tensor, Tensor] = _TritonBoundary.apply(
        hidden_states, shadow_states, *parameters, alpha, transform_mask, injection_mask
    )
    return crossed


class _TritonBoundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        h, s = _rows(h), _rows(s)
        p = FusedParameters(*(parameter.contiguous() for parameter in rest[:8]))
        alpha, transform_mask, injection_mask = rest[8:]
        n, d = h.shape
        k, r = p.gate_up.shape[0], p.injection_up.shape[0]
        crossed, refined = h.new_empty(n, d), s.new_empty(n, d)
        u, bottleneck = s.new_empty(n, 2 * k, dtype=torch.float32), s.new_empty(n, r, dtype=torch.float32)
        mean, rstd = s.new_empty(n, dtype=torch.float32), s.new_empty(n, dtype=torch.float32)
        forward[(triton.cdiv(n, TOKENS),)](
            h, s, h.stride(0), s.stride(0), *p, transform_mask, injection_mask, crossed, refined, u, bottleneck,
            mean, rstd, n, d, k, r, alpha, EPSILON=EPSILON, **_constants(p, transform_mask, injection_mask, h),
        )  # fmt: skip
        ctx.save_for_backward(h, s, refined, u, bottleneck, mean, rstd, transform_mask, injection_mask, *p)
        ctx.alpha = alpha
        return crossed, refined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, s, refined, u, bottleneck, mean, rstd, transform_mask, injection_mask, *rest = ctx.saved_tensors
        p = FusedParameters(*rest)
        n, d = h.shape
        k, r = p.gate_up.shape[0], p.injection_up.shape[0]
        d_crossed, d_refined = gradients[0].contiguous(), gradients[1].contiguous()
        d_h, d_s, d_u, d_p = h.new_empty(n, d), s.new_empty(n, d), torch.empty_like(u), torch.empty_like(bottleneck)
        constants = _constants(p, transform_mask, injection_mask, h)
        backward_tokens[(triton.cdiv(n, TOKENS),)](
            h, s, h.stride(0), s.stride(0), *p, transform_mask, injection_mask, refined, u, mean, rstd, d_crossed,
            d_refined, d_h, d_s, d_u, d_p, n, d, k, r, ctx.alpha, **constants,
        )  # fmt: skip
        parts = min(PARTS, triton.cdiv(n, TOKENS))
        part_tokens = triton.cdiv(triton.cdiv(n, TOKENS), parts) * TOKENS
        shapes = ((d, 2 * k), (k, d), (k, d), (d, r), (r, d))
        sums = [u.new_empty(parts, *shape) for shape in shapes]
        backward_weights[(triton.cdiv(d, WIDTH), parts)](
            h, s, h.stride(0), s.stride(0), p.gate_up, p.injection_down, transform_mask, injection_mask, refined, u,
            bottleneck, mean, rstd, d_crossed, d_refined, d_u, d_p, *sums, n, d, k, r, ctx.alpha, part_tokens,
            **constants,
        )  # fmt: skip
        d_normed, d_transform_up, d_gate_up, d_down, d_up = (part.sum(0) for part in sums)
        a = torch.cat((p.transform_down, p.gate_down), 1).float()
        total = d_u.sum(0)
        d_a = d_normed * p.norm_weight.unsqueeze(1) + torch.outer(p.norm_bias.float(), total)
        d_norm = (d_normed * a).sum(1), a @ total
        by_name = FusedParameters(d_a[:, :k], d_transform_up, d_a[:, k:], d_gate_up, *d_norm, d_down, d_up)
        d_parameters = (gradient.to(own.dtype) for gradient, own in zip(by_name, p, strict=True))
        return d_h, d_s, *d_parameters, None, None, None


def _rows(x: Tensor) -> Tensor:
    """Rows must be contiguous in themselves; they may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(p: FusedParameters, transform_mask: Any, injection_mask: Any, h: Tensor) -> dict[str, Any]:
    return {
        "MASK_T": transform_mask is not None,
        "MASK_P": injection_mask is not None,
        "TOKENS": TOKENS,
        "WIDTH": WIDTH,
        "K": max(16, triton.next_power_of_2(p.gate_up.shape[0])),
        "R": max(16, triton.next_power_of_2(p.injection_up.shape[0])),
        "PRECISION": "ieee" if h.dtype == torch.float32 else "tf32",
    }
