r"""The boundary on CUDA devices: Triton kernels, one forward and two backward, as one autograd operation.

The maths is that of ``fused.py``, Eq. 2-7. Imported only where Triton is installed.

Forward: a program for each ``TOKENS`` tokens walks over d three times (the second and third time h comes from the
cache): u = LN(h) A by sums alone; s' and p = (h - s') W_down; h' = h + alpha p W_up.

Backward: ``_backward_tokens`` walks like the forward kernel and gives dh, ds and the low-rank gradients du, dp of each
token. ``_backward_weights`` has a program for each slice of d and each part of the tokens, and sums the parameters'
gradients in registers; the parts are added in a fixed order, so results do not depend on timing.

16-bit states go through the tensor cores with float32 accumulation; float32 states are multiplied exactly.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowtune.core.kernels.fused import EPSILON, FusedParameters

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
    """Apply a boundary on a CUDA device; arguments and results as for ``fused_boundary``."""
    corrected: tuple[Tensor, Tensor] = _TritonBoundary.apply(  # type: ignore[no-untyped-call]
        hidden_states, shadow_states, *parameters, alpha, transform_mask, injection_mask
    )
    return corrected


class _TritonBoundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        h, s = _with_contiguous_rows(h), _with_contiguous_rows(s)
        p = FusedParameters(*(parameter.contiguous() for parameter in rest[:8]))
        alpha, transform_mask, injection_mask = rest[8:]
        n, d = h.shape
        k, r = p.gate_up.shape[0], p.injection_up.shape[0]
        corrected, updated = h.new_empty(n, d), s.new_empty(n, d)
        u, bottleneck = s.new_empty(n, 2 * k, dtype=torch.float32), s.new_empty(n, r, dtype=torch.float32)
        mean, rstd = s.new_empty(n, dtype=torch.float32), s.new_empty(n, dtype=torch.float32)
        _forward[(triton.cdiv(n, TOKENS),)](
            h, s, h.stride(0), s.stride(0), *p, transform_mask, injection_mask, corrected, updated, u, bottleneck,
            mean, rstd, n, d, k, r, alpha, EPSILON=EPSILON, **_constants(p, transform_mask, injection_mask, h),
        )  # fmt: skip
        ctx.save_for_backward(h, s, updated, u, bottleneck, mean, rstd, transform_mask, injection_mask, *p)
        ctx.alpha = alpha
        return corrected, updated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, s, updated, u, bottleneck, mean, rstd, transform_mask, injection_mask, *rest = ctx.saved_tensors
        p = FusedParameters(*rest)
        n, d = h.shape
        k, r = p.gate_up.shape[0], p.injection_up.shape[0]
        d_corrected, d_updated = gradients[0].contiguous(), gradients[1].contiguous()
        d_h, d_s, d_u, d_p = h.new_empty(n, d), s.new_empty(n, d), torch.empty_like(u), torch.empty_like(bottleneck)
        constants = _constants(p, transform_mask, injection_mask, h)
        _backward_tokens[(triton.cdiv(n, TOKENS),)](
            h, s, h.stride(0), s.stride(0), *p, transform_mask, injection_mask, updated, u, mean, rstd, d_corrected,
            d_updated, d_h, d_s, d_u, d_p, n, d, k, r, ctx.alpha, **constants,
        )  # fmt: skip
        parts = min(PARTS, triton.cdiv(n, TOKENS))
        part_tokens = triton.cdiv(triton.cdiv(n, TOKENS), parts) * TOKENS
        shapes = ((d, 2 * k), (k, d), (k, d), (d, r), (r, d))
        sums = [u.new_empty(parts, *shape) for shape in shapes]
        _backward_weights[(triton.cdiv(d, WIDTH), parts)](
            h, s, h.stride(0), s.stride(0), p.gate_up, p.injection_down, transform_mask, injection_mask, updated, u,
            bottleneck, mean, rstd, d_corrected, d_updated, d_u, d_p, *sums, n, d, k, r, ctx.alpha, part_tokens,
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


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Entries of a row must be adjacent in memory; rows need not be."""
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


@triton.jit
def _load(pointer, rows, columns, stride, row_count, column_count):
    """A tile of a row-major matrix in float32, 0 outside."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, columns, stride, row_count, column_count):
    mask = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _vector(pointer, columns, count):
    return tl.load(pointer + columns, mask=columns < count, other=0.0).to(tl.float32)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _forward(
    h, s, h_stride, s_stride, transform_down, transform_up, gate_down, gate_up, norm_weight, norm_bias,
    injection_down, injection_up, transform_mask, injection_mask, corrected, updated, u, p, mean, rstd,
    n, d, k, r, alpha,
    MASK_T: tl.constexpr, MASK_P: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    low_k, low_r = tl.arange(0, K), tl.arange(0, R)
    total = tl.zeros((TOKENS,), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    u_t, u_g = tl.zeros((TOKENS, K), tl.float32), tl.zeros((TOKENS, K), tl.float32)
    column_t, column_g = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    bias_t, bias_g = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        tile = _load(h, rows, columns, h_stride, n, d)
        total += tl.sum(tile, 1)
        squares += tl.sum(tile * tile, 1)
        weight, bias = _vector(norm_weight, columns, d)[:, None], _vector(norm_bias, columns, d)[:, None]
        down_t = _load(transform_down, columns, low_k, k, d, k)
        down_g = _load(gate_down, columns, low_k, k, d, k)
        u_t += tl.dot(tile, down_t * weight, input_precision=PRECISION)
        u_g += tl.dot(tile, down_g * weight, input_precision=PRECISION)
        column_t += tl.sum(down_t * weight, 0)
        column_g += tl.sum(down_g * weight, 0)
        bias_t += tl.sum(down_t * bias, 0)
        bias_g += tl.sum(down_g * bias, 0)
    average = total / d
    scale = 1.0 / tl.sqrt(squares / d - average * average + EPSILON)
    u_t = scale[:, None] * (u_t - average[:, None] * column_t[None, :]) + bias_t[None, :]
    u_g = scale[:, None] * (u_g - average[:, None] * column_g[None, :]) + bias_g[None, :]
    _store(u, u_t, rows, low_k, 2 * k, n, k)
    _store(u + k, u_g, rows, low_k, 2 * k, n, k)
    tl.store(mean + rows, average, mask=rows < n)
    tl.store(rstd + rows, scale, mask=rows < n)
    hidden_t, hidden_g = _silu(u_t), _silu(u_g)
    if MASK_T:
        hidden_t *= _load(transform_mask, rows, low_k, k, n, k)
    bottleneck = tl.zeros((TOKENS, R), tl.float32)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        t = tl.dot(hidden_t, _load(transform_up, low_k, columns, d, k, d), input_precision=PRECISION)
        g = tl.sigmoid(tl.dot(hidden_g, _load(gate_up, low_k, columns, d, k, d), input_precision=PRECISION))
        state = _load(s, rows, columns, s_stride, n, d)
        state += g * (t - state)
        _store(updated, state, rows, columns, d, n, d)
        delta = _load(h, rows, columns, h_stride, n, d) - state
        bottleneck += tl.dot(delta, _load(injection_down, columns, low_r, r, d, r), input_precision=PRECISION)
    _store(p, bottleneck, rows, low_r, r, n, r)
    if MASK_P:
        bottleneck *= _load(injection_mask, rows, low_r, r, n, r)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        up = _load(injection_up, low_r, columns, d, r, d)
        tile = _load(h, rows, columns, h_stride, n, d) + alpha * tl.dot(bottleneck, up, input_precision=PRECISION)
        _store(corrected, tile, rows, columns, d, n, d)


@triton.jit
def _state_gradients(
    columns, rows, s, updated, d_updated_in, s_stride, d_bottleneck, hidden_g, gate_up, injection_down,
    n, d, k, r, K: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dt, dz, ds) on a tile: dt = g ds', ds = ds' - dt, dz = (s' - s) ds."""
    down = _load(injection_down, columns, tl.arange(0, R), r, d, r)
    total = _load(d_updated_in, rows, columns, d, n, d)
    total -= tl.dot(d_bottleneck, tl.trans(down), input_precision=PRECISION)
    up = _load(gate_up, tl.arange(0, K), columns, d, k, d)
    d_t = tl.sigmoid(tl.dot(hidden_g, up, input_precision=PRECISION)) * total
    d_s = total - d_t
    d_z = (_load(updated, rows, columns, d, n, d) - _load(s, rows, columns, s_stride, n, d)) * d_s
    return d_t, d_z, d_s


@triton.jit
def _backward_tokens(
    h, s, h_stride, s_stride, transform_down, transform_up, gate_down, gate_up, norm_weight, norm_bias,
    injection_down, injection_up, transform_mask, injection_mask, updated, u, mean, rstd, d_corrected, d_updated,
    d_h, d_s, d_u, d_p, n, d, k, r, alpha,
    MASK_T: tl.constexpr, MASK_P: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    low_k, low_r = tl.arange(0, K), tl.arange(0, R)
    d_bottleneck = tl.zeros((TOKENS, R), tl.float32)
    column_t, column_g = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    bias_t, bias_g = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        up = _load(injection_up, low_r, columns, d, r, d)
        gradient = _load(d_corrected, rows, columns, d, n, d)
        d_bottleneck += alpha * tl.dot(gradient, tl.trans(up), input_precision=PRECISION)
        weight, bias = _vector(norm_weight, columns, d)[:, None], _vector(norm_bias, columns, d)[:, None]
        down_t = _load(transform_down, columns, low_k, k, d, k)
        down_g = _load(gate_down, columns, low_k, k, d, k)
        column_t += tl.sum(down_t * weight, 0)
        column_g += tl.sum(down_g * weight, 0)
        bias_t += tl.sum(down_t * bias, 0)
        bias_g += tl.sum(down_g * bias, 0)
    if MASK_P:
        d_bottleneck *= _load(injection_mask, rows, low_r, r, n, r)
    u_t, u_g = _load(u, rows, low_k, 2 * k, n, k), _load(u + k, rows, low_k, 2 * k, n, k)
    d_t_hidden, d_g_hidden = tl.zeros((TOKENS, K), tl.float32), tl.zeros((TOKENS, K), tl.float32)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        d_t, d_z, d_state = _state_gradients(
            columns, rows, s, updated, d_updated, s_stride, d_bottleneck, _silu(u_g), gate_up, injection_down,
            n, d, k, r, K, R, PRECISION,
        )  # fmt: skip
        _store(d_s, d_state, rows, columns, d, n, d)
        up_t = _load(transform_up, low_k, columns, d, k, d)
        up_g = _load(gate_up, low_k, columns, d, k, d)
        d_t_hidden += tl.dot(d_t, tl.trans(up_t), input_precision=PRECISION)
        d_g_hidden += tl.dot(d_z, tl.trans(up_g), input_precision=PRECISION)
    if MASK_T:
        d_t_hidden *= _load(transform_mask, rows, low_k, k, n, k)
    sigma_t, sigma_g = tl.sigmoid(u_t), tl.sigmoid(u_g)
    d_u_t = d_t_hidden * sigma_t * (1 + u_t * (1 - sigma_t))
    d_u_g = d_g_hidden * sigma_g * (1 + u_g * (1 - sigma_g))
    _store(d_u, d_u_t, rows, low_k, 2 * k, n, k)
    _store(d_u + k, d_u_g, rows, low_k, 2 * k, n, k)
    _store(d_p, d_bottleneck, rows, low_r, r, n, r)
    average = tl.load(mean + rows, mask=rows < n, other=0.0)
    scale = tl.load(rstd + rows, mask=rows < n, other=0.0)
    mean_dn = tl.sum(d_u_t * column_t[None, :] + d_u_g * column_g[None, :], 1) / d
    mean_ndn = tl.sum(d_u_t * (u_t - bias_t[None, :]) + d_u_g * (u_g - bias_g[None, :]), 1) / d
    slope = -scale * scale * mean_ndn
    level = -scale * mean_dn - slope * average
    d_u_t *= scale[:, None]
    d_u_g *= scale[:, None]
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        weight = _vector(norm_weight, columns, d)[:, None]
        down_t = _load(transform_down, columns, low_k, k, d, k) * weight
        down_g = _load(gate_down, columns, low_k, k, d, k) * weight
        down = _load(injection_down, columns, low_r, r, d, r)
        gradient = _load(d_corrected, rows, columns, d, n, d)
        gradient += tl.dot(d_u_t, tl.trans(down_t), input_precision=PRECISION)
        gradient += tl.dot(d_u_g, tl.trans(down_g), input_precision=PRECISION)
        gradient += tl.dot(d_bottleneck, tl.trans(down), input_precision=PRECISION)
        gradient += slope[:, None] * _load(h, rows, columns, h_stride, n, d) + level[:, None]
        _store(d_h, gradient, rows, columns, d, n, d)


@triton.jit
def _backward_weights(
    h, s, h_stride, s_stride, gate_up, injection_down, transform_mask, injection_mask, updated, u, p, mean, rstd,
    d_corrected, d_updated, d_u, d_p, d_normed_down, d_up_t, d_up_g, d_down, d_up,
    n, d, k, r, alpha, part_tokens,
    MASK_T: tl.constexpr, MASK_P: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    low_k, low_r = tl.arange(0, K), tl.arange(0, R)
    normed_t, normed_g = tl.zeros((WIDTH, K), tl.float32), tl.zeros((WIDTH, K), tl.float32)
    up_t, up_g = tl.zeros((K, WIDTH), tl.float32), tl.zeros((K, WIDTH), tl.float32)
    down, up = tl.zeros((WIDTH, R), tl.float32), tl.zeros((R, WIDTH), tl.float32)
    for start in range(part * part_tokens, min(n, (part + 1) * part_tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        u_t, u_g = _load(u, rows, low_k, 2 * k, n, k), _load(u + k, rows, low_k, 2 * k, n, k)
        hidden_t, hidden_g = _silu(u_t), _silu(u_g)
        if MASK_T:
            hidden_t *= _load(transform_mask, rows, low_k, k, n, k)
        d_bottleneck = _load(d_p, rows, low_r, r, n, r)
        d_t, d_z, _ = _state_gradients(
            columns, rows, s, updated, d_updated, s_stride, d_bottleneck, hidden_g, gate_up, injection_down,
            n, d, k, r, K, R, PRECISION,
        )  # fmt: skip
        up_t += tl.dot(tl.trans(hidden_t), d_t, input_precision=PRECISION)
        up_g += tl.dot(tl.trans(hidden_g), d_z, input_precision=PRECISION)
        bottleneck = _load(p, rows, low_r, r, n, r)
        if MASK_P:
            bottleneck *= _load(injection_mask, rows, low_r, r, n, r)
        gradient = _load(d_corrected, rows, columns, d, n, d)
        up += alpha * tl.dot(tl.trans(bottleneck), gradient, input_precision=PRECISION)
        tile = _load(h, rows, columns, h_stride, n, d)
        delta = tile - _load(updated, rows, columns, d, n, d)
        down += tl.dot(tl.trans(delta), d_bottleneck, input_precision=PRECISION)
        average = tl.load(mean + rows, mask=rows < n, other=0.0)
        scale = tl.load(rstd + rows, mask=rows < n, other=0.0)
        normed = (tile - average[:, None]) * scale[:, None]
        normed_t += tl.dot(tl.trans(normed), _load(d_u, rows, low_k, 2 * k, n, k), input_precision=PRECISION)
        normed_g += tl.dot(tl.trans(normed), _load(d_u + k, rows, low_k, 2 * k, n, k), input_precision=PRECISION)
    _store(d_normed_down + part * d * 2 * k, normed_t, columns, low_k, 2 * k, d, k)
    _store(d_normed_down + part * d * 2 * k + k, normed_g, columns, low_k, 2 * k, d, k)
    _store(d_up_t + part * k * d, up_t, low_k, columns, d, k, d)
    _store(d_up_g + part * k * d, up_g, low_k, columns, d, k, d)
    _store(d_down + part * d * r, down, columns, low_r, r, d, r)
    _store(d_up + part * r * d, up, low_r, columns, d, r, d)
