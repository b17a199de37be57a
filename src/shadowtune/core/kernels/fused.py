r"""Boundaries as single operations on CPU and without Triton: with hand-written gradients, and for inference.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7, for N tokens, with A = [T_down | G_down] (d, 2k):

    u  = LN(h) A                                      (N, 2k)
    t  = silu(u_T) T_up,  g = sigmoid(silu(u_G) G_up)
    s' = s + g * (t - s)
    p  = (h - s') W_down                              (N, r)
    h' = h + alpha * p W_up

Why ``fused_boundary`` is cheap:
- T and G read LN(h) in one product; the norm's weight and bias fold into it: LN(h) A = n (w * A) + b A with n the
  normalized h.
- Kept for the backward pass are h, s, s' (which the next boundary keeps anyway), u, p, and two numbers a token. t and
  g are recomputed from u; t - s is not needed, because g (t - s) = s' - s.
- The norm's backward needs the means of dn and of n * dn over d. Both are low-rank: dn = du (w * A)^T, so they are
  du colmean(w * A) and <du, u - b A> / d, and n is never formed again.
- All products that add to dh are one product.
- On a CPU a fresh (N, d) array costs more than a pass over an existing one, and a product with the short side first
  less than its transpose: arrays that are no longer needed are overwritten, and every sum over tokens is
  (short x N) (N x d).

``inference_boundary`` is for few tokens, where each operation costs more by its call than by its work.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
"""Of the LayerNorm; the default of ``torch.nn.functional.layer_norm``."""
RMS_EPSILON = 1e-6
"""Of the stateless boundary's RMSNorm, whose input has about size 1."""
FEW_TOKENS = 64
"""Number of tokens below which the fused operations are slower on a CPU than plain torch operations."""


class FusedParameters(NamedTuple):
    """Parameters of one boundary: T and G (d, k) down and (k, d) up, the norm (d,), the injection (d, r) and (r, d)."""

    transform_down: Tensor
    transform_up: Tensor
    gate_down: Tensor
    gate_up: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    injection_down: Tensor
    injection_up: Tensor


def fused_boundary(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: FusedParameters,
    alpha: float,
    transform_mask: Tensor | None = None,
    injection_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply a boundary with gradients: update of the state, then injection.

    Args:
        hidden_states: h (N, d).
        shadow_states: s (N, d), of the same dtype as the parameters.
        parameters: of this boundary; SiLU, no biases.
        alpha: scale of the injection.
        transform_mask: dropout of T's hidden layer, already scaled, (N, k); or None.
        injection_mask: dropout of the injection's bottleneck, already scaled, (N, r); or None.

    Returns:
        h' in the dtype of h and s' in that of s, (N, d).
    """
    corrected: tuple[Tensor, Tensor] = _FusedBoundary.apply(  # type: ignore[no-untyped-call]
        hidden_states, shadow_states, *parameters, alpha, transform_mask, injection_mask
    )
    return corrected


class _FusedBoundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        p, (alpha, transform_mask, injection_mask) = FusedParameters(*rest[:8]), rest[8:]
        k = p.gate_up.shape[0]
        wide = h.to(s.dtype)
        n, mean, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, EPSILON)
        a = torch.cat((p.transform_down, p.gate_down), 1)
        u = torch.addmm(p.norm_bias @ a, n, a * p.norm_weight.unsqueeze(1))
        inner = F.silu(u)
        g = torch.mm(inner[:, k:], p.gate_up, out=n).sigmoid_()  # n is not needed any more: use its memory
        t = torch.mm(_masked(inner[:, :k], transform_mask), p.transform_up)
        updated = torch.lerp(s, t, g)
        bottleneck = torch.sub(wide, updated, out=t) @ p.injection_down
        corrected = torch.addmm(wide, _masked(bottleneck, injection_mask), p.injection_up, alpha=alpha, out=t)
        ctx.save_for_backward(h, s, updated, u, bottleneck, mean, rstd, transform_mask, injection_mask, *p)
        ctx.alpha = alpha
        return corrected.to(h.dtype), updated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, s, updated, u, bottleneck, mean, rstd, transform_mask, injection_mask, *rest = ctx.saved_tensors
        p = FusedParameters(*rest)
        d, k = p.gate_down.shape
        d_corrected, d_state = gradients[0].to(s.dtype), gradients[1]
        wide = h.to(s.dtype)

        # injection (Eq. 2-4)
        d_up = ctx.alpha * (_masked(bottleneck, injection_mask).t() @ d_corrected)
        d_bottleneck = _masked(ctx.alpha * (d_corrected @ p.injection_up.t()), injection_mask)
        d_updated = torch.addmm(d_state, d_bottleneck, p.injection_down.t(), alpha=-1)

        # gate and lerp (Eq. 7): dt = g ds', ds = (1 - g) ds', dz = g (1 - g) (t - s) ds' = (s' - s) ds
        inner = F.silu(u)
        hidden_t, hidden_g = _masked(inner[:, :k], transform_mask), inner[:, k:]
        d_t = torch.mm(hidden_g, p.gate_up).sigmoid_().mul_(d_updated)
        d_s = d_updated.sub_(d_t)
        d_transform_up = hidden_t.t() @ d_t
        d_inner_t = _masked(d_t @ p.transform_up.t(), transform_mask)
        d_z = torch.sub(updated, s, out=d_t).mul_(d_s)
        d_gate_up = hidden_g.t() @ d_z
        d_inner = torch.cat((d_inner_t, d_z @ p.gate_up.t()), 1)
        sigma = torch.sigmoid(u)
        d_u = d_inner * sigma * (1 + u * (1 - sigma))

        # T and G's way down, and the norm: dh = rstd (dn - mean(dn) - n mean(n dn))
        a = torch.cat((p.transform_down, p.gate_down), 1)
        scaled = a * p.norm_weight.unsqueeze(1)
        mean_dn = (d_u @ scaled.mean(0)).unsqueeze(1)
        mean_ndn = (d_u * (u - p.norm_bias @ a)).sum(1, keepdim=True) / d
        slope = -(rstd**2) * mean_ndn
        left = torch.cat((rstd * d_u, d_bottleneck, -rstd * mean_dn - slope * mean), 1)
        right = torch.cat((scaled, p.injection_down, torch.ones_like(scaled[:, :1])), 1)
        d_h = torch.addmm(d_corrected, left, right.t()).addcmul_(wide, slope)

        across = (left[:, :-1].t() @ wide).t()
        d_scaled = across[:, : 2 * k] - (mean * left[:, : 2 * k]).sum(0)
        d_down = across[:, 2 * k :] - (d_bottleneck.t() @ updated).t()
        total = d_u.sum(0)
        d_a = d_scaled * p.norm_weight.unsqueeze(1) + torch.outer(p.norm_bias, total)
        d_norm = ((d_scaled * a).sum(1), a @ total)
        d_updates = (d_a[:, :k], d_transform_up, d_a[:, k:], d_gate_up)
        return d_h.to(h.dtype), d_s, *d_updates, *d_norm, d_down, d_up, None, None, None


def inference_boundary(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: FusedParameters,
    alpha: float,
    transform_mask: Tensor | None = None,
    injection_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply a boundary without masks and gradients; arguments and result as for ``fused_boundary``."""
    assert transform_mask is None and injection_mask is None
    p, wide = parameters, hidden_states.to(shadow_states.dtype)
    n = F.layer_norm(wide, wide.shape[-1:], p.norm_weight, p.norm_bias)
    t = torch.mm(F.silu(torch.mm(n, p.transform_down), inplace=True), p.transform_up)
    g = torch.mm(F.silu(torch.mm(n, p.gate_down), inplace=True), p.gate_up, out=n).sigmoid_()
    updated = torch.lerp(shadow_states, t, g)
    bottleneck = torch.mm(torch.sub(wide, updated, out=t), p.injection_down)
    corrected = torch.addmm(wide, bottleneck, p.injection_up, alpha=alpha, out=t)
    return corrected.to(hidden_states.dtype), updated


def fused_stateless_boundary(
    hidden_states: Tensor, down: Tensor, up: Tensor, channel_scales: Tensor, size: Tensor, mask: Tensor | None
) -> Tensor:
    """Apply a stateless boundary (``stateless.py``) with gradients.

    Args:
        hidden_states: h (N, d).
        down, up, channel_scales, size: as in ``StatelessParameters``.
        mask: dropout of the bottleneck, already scaled, (N, r); or None.

    Returns:
        h' (N, d) in the dtype of h.
    """
    corrected: Tensor = _FusedStatelessBoundary.apply(hidden_states, down, up, channel_scales, size, mask)  # type: ignore[no-untyped-call]
    return corrected


class _FusedStatelessBoundary(torch.autograd.Function):
    """Keeps h, the bottleneck (N, r) and one number a token.

    With E = c W_down: x W_down = rstd (h E), rstd = (mean((c h)^2) + eps)^-1/2, so x is never formed; nor is its
    gradient, because d rstd is <dz, h E>, r numbers a token.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, *rest: Any) -> Tensor:
        down, up, scales, size, mask = rest
        scales, wide = scales.to(down.dtype), h.to(down.dtype)
        squares = wide * wide
        rstd = torch.rsqrt(torch.mv(squares, scales * scales / wide.shape[1]) + RMS_EPSILON).unsqueeze(1)
        u = wide @ (scales.unsqueeze(1) * down)
        inner = _masked(u * rstd, mask).mul_(size)
        corrected = torch.addmm(wide, inner, up, out=squares)
        ctx.save_for_backward(h, u, rstd, mask, down, up, scales, size)
        return corrected.to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, u, rstd, mask, down, up, scales, size = ctx.saved_tensors
        d_h, wide = gradients[0].to(down.dtype), h.to(down.dtype)
        inner = _masked(u * rstd, mask).mul_(size)
        d_up = inner.t() @ d_h
        d_z = _masked(d_h @ up.t(), mask).mul_(size)
        d_u = d_z * rstd
        d_down = (d_u.t() @ wide).t() * scales.unsqueeze(1)
        if ctx.needs_input_grad[0]:
            slope = -(rstd**3) * (d_z * u).sum(1, keepdim=True)
            d_h = torch.addmm(d_h, d_u, (scales.unsqueeze(1) * down).t())
            d_h.addcmul_(wide * (scales * scales / wide.shape[1]), slope)
        return d_h.to(h.dtype) if ctx.needs_input_grad[0] else None, d_down, d_up, None, None, None


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; the meta device, on which costs are counted, knows none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
