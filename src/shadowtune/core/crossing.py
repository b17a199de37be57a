r"""One boundary, (h, s) -> (h', s'): step by step, or by the fastest operation that fits.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7; the equations stand in ``boundary.py``.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.fused import FusedParameters, fused_boundary
from shadowtune.core.inference import inference_boundary

Kernel = Literal["auto", "reference", "fused", "triton"]
"""How a boundary is crossed: by the fastest operation that fits, step by step, or by the one named."""
Crossing = Callable[..., tuple[Tensor, Tensor]]
"""A fast operation, called like ``fused_boundary``."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
FEW_TOKENS = 64
"""Below so many tokens the fused operation costs a processor more than the steps do."""


class Mlp(NamedTuple):
    """Two layers: down (d, n) and up (n, d), each with a bias or without."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


class BoundaryParameters(NamedTuple):
    """What one boundary needs: W_down and W_up; T and G, and (weight, bias) of the norm before them, if it updates."""

    injection: Mlp
    transform: Mlp | None = None
    gate: Mlp | None = None
    norm: tuple[Tensor, Tensor] | None = None


def cross(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: BoundaryParameters,
    config: ShadowConfig,
    kernel: Kernel = "auto",
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross a boundary.

    Args:
        hidden_states: h (..., d).
        shadow_states: s (..., d).
        parameters: of this boundary, all of one dtype.
        config: the shadow's settings.
        kernel: "auto" takes Triton on CUDA devices; on others the fused operation for gradients of many tokens and
            the one of ``inference.py`` without gradients; and the steps for the rest: other variants than the paper's,
            autocast, and while torch compiles, which fuses by itself.
        training: whether dropout is on.

    Returns:
        h' in the dtype of h and s' in the dtype of the parameters, both (..., d).
    """
    dtype = parameters.injection.down.dtype
    operation = _operation(hidden_states, parameters, config, kernel, training)
    if operation is not None:
        return _cross_rows(operation, hidden_states, shadow_states.to(dtype), parameters, config, training)
    h, s = hidden_states.to(dtype), shadow_states.to(dtype)
    if parameters.transform is not None:
        s = _update(h, s, parameters, config, training)
    return hidden_states + _correction(h, s, parameters.injection, config, training).to(hidden_states.dtype), s


def _update(h: Tensor, s: Tensor, p: BoundaryParameters, config: ShadowConfig, training: bool) -> Tensor:
    """Eq. 5-7."""
    assert p.transform is not None and p.gate is not None
    n = h if p.norm is None else F.layer_norm(h, h.shape[-1:], *p.norm)
    activation = ACTIVATIONS[config.activation]
    inner = activation(_affine(n, p.transform.down, p.transform.down_bias))
    if config.transform_dropout and training:
        inner = F.dropout(inner, config.dropout)
    t = _affine(inner, p.transform.up, p.transform.up_bias)
    inner = activation(_affine(n, p.gate.down, p.gate.down_bias))
    g = torch.sigmoid(_affine(inner, p.gate.up, p.gate.up_bias))
    return torch.lerp(s, t.to(s.dtype), g.to(s.dtype))


def _correction(h: Tensor, s: Tensor, injection: Mlp, config: ShadowConfig, training: bool) -> Tensor:
    """Alpha * Drop((h - s) W_down) W_up of Eq. 2-4."""
    delta = h - s
    if config.dropout_position == "hidden" and training:
        delta = F.dropout(delta, config.dropout)
    inner = delta @ injection.down
    if config.dropout_position == "rank" and training:
        inner = F.dropout(inner, config.dropout)
    return (config.alpha * inner) @ injection.up


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X W (+ b), with W stored (inputs, outputs)."""
    return x @ weight if bias is None else x @ weight + bias


def _operation(
    h: Tensor, p: BoundaryParameters, config: ShadowConfig, kernel: Kernel, training: bool
) -> Crossing | None:
    """Choose the fast operation for a call, or None for the steps."""
    paper = not config.update_bias and config.activation == "silu" and config.dropout_position == "rank"
    if kernel == "reference" or not paper or p.norm is None or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(h.device.type):
        return None
    if kernel == "auto":
        kernel = _fastest(h.device.type)
        if kernel == "fused" and not torch.is_grad_enabled():
            return None if training and config.dropout > 0 else inference_boundary
        if kernel == "fused" and h.numel() < FEW_TOKENS * h.shape[-1]:
            return None
    return _triton() if kernel == "triton" else fused_boundary


@functools.cache
def _fastest(device_type: str) -> Kernel:
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") is not None else "fused"


@functools.cache
def _triton() -> Crossing:
    from shadowtune.core.triton_boundary import triton_boundary  # needs Triton, which CPU builds of torch lack

    return triton_boundary


def _cross_rows(
    operation: Crossing, h: Tensor, s: Tensor, p: BoundaryParameters, config: ShadowConfig, training: bool
) -> tuple[Tensor, Tensor]:
    """Apply a fast operation to (N, d) rows."""
    assert p.transform is not None and p.gate is not None and p.norm is not None
    fused = FusedParameters(
        p.transform.down, p.transform.up, p.gate.down, p.gate.up, *p.norm, p.injection.down, p.injection.up
    )
    rows = h.reshape(-1, h.shape[-1])
    states = s.reshape(rows.shape)
    dropped = training and config.dropout > 0
    transform_mask = _mask(states, config.update_width, config) if dropped and config.transform_dropout else None
    injection_mask = _mask(states, config.rank, config) if dropped else None
    crossed, refined = operation(rows, states, fused, config.alpha, transform_mask, injection_mask)
    return crossed.view(h.shape), refined.view(s.shape)


def _mask(rows: Tensor, width: int, config: ShadowConfig) -> Tensor:
    """What dropout multiplies (N, width) numbers by."""
    return F.dropout(rows.new_ones(rows.shape[0], width), config.dropout)
