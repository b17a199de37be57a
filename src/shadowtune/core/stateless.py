r"""The stateless boundary: a correction of the hidden state h that reads h alone. Not in the paper.

In front of block l, with channel scales c_l (d,) and the input size m_l (both measured once, by
``model/initialization.py``):

    x  = RMSNorm(c_l * h)                          normalizes each token and balances its channels
    h' = h + f m_l Drop(x W_down) W_up             W_down (d, r), W_up (r, d), W_up = 0 at the start
    f  = alpha (R / r)^p (D / L') (W / d)          R, D, W: ``REFERENCE``; L' boundaries

m_l is the root mean square of that block's usual input. f is chosen so that a step of Adam, which moves each weight by
about the learning rate whatever the gradient's size, changes h by the same fraction of its size for every r, d and L'
(in the manner of muP, https://arxiv.org/abs/2203.03466), so that a learning rate found at one size serves at others.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.kernels.fused import FEW_TOKENS, RMS_EPSILON, autocasts, fused_stateless_boundary


class ReferenceSizes(NamedTuple):
    """Sizes at which f equals alpha."""

    rank: int
    boundaries: int
    width: int


REFERENCE = ReferenceSizes(16, 30, 576)
"""The sizes of SmolLM2-135M and a rank, at which learning rates were searched."""
RANK_EXPONENT = 1.0
"""p."""


class StatelessParameters(NamedTuple):
    """Parameters of one stateless boundary."""

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
    rank = float((REFERENCE.rank / config.rank) ** RANK_EXPONENT)
    return config.alpha * rank * (REFERENCE.boundaries / boundaries) * (REFERENCE.width / width)


def initial_std(width: int) -> float:
    """Return the initial standard deviation of W_down, at which f x W_down has the same size for every width."""
    return float(width**0.5) / REFERENCE.width


def apply_stateless_boundary(
    hidden_states: Tensor, parameters: StatelessParameters, config: ShadowConfig, kernel: str, training: bool
) -> Tensor:
    """Apply a stateless boundary.

    Args:
        hidden_states: h (..., d).
        parameters: of this boundary, of one dtype.
        config: the shadow's settings.
        kernel: as for ``boundary.apply_boundary``. This variant has no Triton kernel: "triton" uses torch operations.
        training: whether dropout is on.

    Returns:
        h' (..., d) in the dtype of h.
    """
    dropped = training and config.dropout > 0
    if _fits_fused(hidden_states, parameters, config, kernel, dropped):
        matrix = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask = None
        if dropped:
            mask = F.dropout(parameters.down.new_ones(len(matrix), config.rank), config.dropout)
        return fused_stateless_boundary(matrix, *parameters, mask).view(hidden_states.shape)
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
    return F.rms_norm(scaled, scaled.shape[-1:], eps=RMS_EPSILON)


def _fits_fused(h: Tensor, p: StatelessParameters, config: ShadowConfig, kernel: str, dropped: bool) -> bool:
    """Whether to use the fused operation: in full precision and, by default, for gradients of many tokens."""
    if kernel in ("reference", "triton") or torch.compiler.is_compiling() or autocasts(h.device.type):
        return False
    if p.down.dtype not in (torch.float32, torch.float64) or (dropped and config.dropout_position == "hidden"):
        return False
    return kernel == "fused" or (torch.is_grad_enabled() and h.numel() >= FEW_TOKENS * h.shape[-1])
