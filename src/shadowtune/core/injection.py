r"""The stateless boundary: a correction of h that reads h alone. Not in the paper.

In front of block l, with c_l (d,) and the size m_l measured once (``model/channel_scales.py``):

    x  = RMSNorm(c_l * h)                          each token normalized, its channels alike
    h' = h + f m_l Drop(x W_down) W_up             W_down (d, r), W_up (r, d), W_up = 0 at the start
    f  = alpha (R / r)^p (D / L') (W / d)          R, D, W: ``REFERENCE``; L' boundaries

m_l is the root mean square of that block's usual input. f is chosen so that a step of Adam, which moves each weight by
about the learning rate whatever the gradient's size, moves h by the same share of its size for every r, d and L'
(in the manner of muP, https://arxiv.org/abs/2203.03466), so that a learning rate found at one size serves at others.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig

EPSILON = 1e-6
"""Of the RMSNorm, whose input has about size 1."""
FEW_TOKENS = 64
"""Below so many tokens the fused operation costs more by its calls than it saves."""


class Sizes(NamedTuple):
    """Sizes at which f is alpha."""

    rank: int
    boundaries: int
    width: int


REFERENCE = Sizes(16, 30, 576)
"""Those of SmolLM2-135M and a rank at which learning rates were searched."""
RANK_EXPONENT = 1.0
"""p."""


class InjectionParameters(NamedTuple):
    """What one stateless boundary needs."""

    down: Tensor
    """W_down (d, r)."""
    up: Tensor
    """W_up (r, d)."""
    channel_scales: Tensor
    """c (d,)."""
    size: Tensor
    """f m, a scalar."""


def injection_scale(config: ShadowConfig, boundaries: int, width: int) -> float:
    """Return f for a number of boundaries and a width d."""
    rank = (REFERENCE.rank / config.rank) ** RANK_EXPONENT
    return config.alpha * rank * (REFERENCE.boundaries / boundaries) * (REFERENCE.width / width)


def initial_std(width: int) -> float:
    """Return the standard deviation of W_down at the start, by which f x W_down is of the same size for every width."""
    return width**0.5 / REFERENCE.width


def inject(
    hidden_states: Tensor, parameters: InjectionParameters, config: ShadowConfig, kernel: str, training: bool
) -> Tensor:
    """Apply a stateless boundary.

    Args:
        hidden_states: h (..., d).
        parameters: of this boundary, of one dtype.
        config: the shadow's settings.
        kernel: as for ``crossing.cross``; there is no Triton kernel of this variant, and "triton" takes the steps.
        training: whether dropout is on.

    Returns:
        h' (..., d) in the dtype of h.
    """
    dropped = training and config.dropout > 0
    if _fits_fused(hidden_states, parameters, config, kernel, dropped):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask = None
        if dropped:
            mask = F.dropout(parameters.down.new_ones(len(rows), config.rank), config.dropout)
        injected: Tensor = _FusedInjection.apply(rows, *parameters, mask)
        return injected.view(hidden_states.shape)
    x = normalized(hidden_states, parameters.channel_scales).to(parameters.down.dtype)
    if dropped and config.dropout_position == "hidden":
        x = F.dropout(x, config.dropout)
    inner = x @ parameters.down
    if dropped and config.dropout_position == "rank":
        inner = F.dropout(inner, config.dropout)
    correction = (inner * parameters.size.to(inner.dtype)) @ parameters.up
    return hidden_states + correction.to(hidden_states.dtype)


def normalized(hidden_states: Tensor, channel_scales: Tensor) -> Tensor:
    """Return RMSNorm(c * h) (..., d), in float32 or wider: the first tokens of a text can overflow half precision."""
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, channel_scales.dtype), torch.float32)
    scaled = hidden_states.to(dtype) * channel_scales.to(dtype)
    return F.rms_norm(scaled, scaled.shape[-1:], eps=EPSILON)


def _fits_fused(h: Tensor, p: InjectionParameters, config: ShadowConfig, kernel: str, dropped: bool) -> bool:
    """Whether the fused operation computes this call: with gradients, in full precision, and by default for many."""
    if kernel in ("reference", "triton") or torch.compiler.is_compiling() or torch.is_autocast_enabled(h.device.type):
        return False
    if p.down.dtype not in (torch.float32, torch.float64) or (dropped and config.dropout_position == "hidden"):
        return False
    return kernel == "fused" or (torch.is_grad_enabled() and h.numel() >= FEW_TOKENS * h.shape[-1])


class _FusedInjection(torch.autograd.Function):
    """The boundary over (N, d) rows as one operation, of which h, (N, r) and one number a token are kept.

    With E = c W_down: x W_down = rstd (h E), rstd = (mean((c h)^2) + eps)^-1/2, so x is never made; nor is its
    gradient, for d rstd is <dz, h E>, of r numbers a token.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, *rest: Any) -> Tensor:
        down, up, scales, size, mask = rest
        scales, wide = scales.to(down.dtype), h.to(down.dtype)
        spent = wide * wide
        rstd = torch.rsqrt(torch.mv(spent, scales * scales / wide.shape[1]) + EPSILON).unsqueeze(1)
        u = wide @ (scales.unsqueeze(1) * down)
        inner = _masked(u * rstd, mask).mul_(size)
        injected = torch.addmm(wide, inner, up, out=spent)
        ctx.save_for_backward(h, u, rstd, mask, down, up, scales, size)
        return injected.to(h.dtype)

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


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
