r"""Boundaries of several adapters (shadows) on one base, applied in one batch, without gradients.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7, for N tokens, each of which belongs to one of A adapters:

    n  = LN(h) * w_a + b_a
    t  = (M_k silu(n [T_1 | ... | T_A])) [T'_1; ...; T'_A],   g likewise
    s' = (1 - g) * s + g * t
    h' = h + (M_r ((h - s') [D_1 | ... | D_A])) [alpha_1 U_1; ...; alpha_A U_A]

M_r (N, sum of r) and M_k (N, sum of k) are 1 in the columns of the token's own adapter and 0 elsewhere. Other adapters'
columns are multiplied by 0, so each token gets what it would get alone, whatever the ranks, and the number of
operations is that of one adapter. Tokens without an adapter have no columns and pass unchanged.

The variant "stateless" (``stateless.py``) likewise, with the norms of all adapters computed at once:

    rstd_a = (mean((c_a * h)^2) + eps)^-1/2            (h * h) [c_1^2 | ... | c_A^2] / d
    h' = h + (M_r ((h [c_1 D_1 | ... | c_A D_A]) rstd_a)) [f_1 m_1 U_1; ...; f_A m_A U_A]

In front of the head each token gets gamma_a s0 of its own adapter (logit interpolation).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.boundary import ACTIVATIONS, Boundaries, BoundaryParameters, Mlp, interpolate
from shadowtune.core.kernels.fused import EPSILON, RMS_EPSILON
from shadowtune.core.stateless import StatelessParameters


class StackedParameters(NamedTuple):
    """One boundary of all adapters: D (d, R) and U (R, d), alpha included; T and G, if any of them updates."""

    injection: Mlp
    down: Tensor | None = None
    """Of T, then of G, (d, 2K)."""
    down_bias: Tensor | None = None
    """(2K,), None if no adapter has one."""
    transform_up: Tensor | None = None
    """(K, d)."""
    gate_up: Tensor | None = None
    up_biases: tuple[Tensor, Tensor] | None = None
    """Of T and G, a row for each adapter and one of zeros for none, (A + 1, d)."""


class StackedStatelessParameters(NamedTuple):
    """One stateless boundary of all adapters."""

    down: Tensor
    """[c_1 D_1 | ... | c_A D_A] (d, R)."""
    up: Tensor
    """[f_1 m_1 U_1; ...; f_A m_A U_A] (R, d)."""
    squares: Tensor
    """c_a^2 / d of each adapter, and 0 for none (d, A + 1)."""


def batching_key(boundaries: Boundaries) -> Hashable:
    """Return what two adapters of one base must have in common to be applied in one batch."""
    config, downs = boundaries.config, boundaries.injection_downs
    kind = (config.variant, config.activation, boundaries.first, config.update_norm)
    return (boundaries.count, downs.dtype, downs.device, *kind)


class AdapterStack:
    """The stacked boundaries of a set of adapters; made once for each set.

    Args:
        members: boundaries of one base with equal ``batching_key``. They are copied: later changes are not seen.
    """

    parameters: list[StackedParameters] | list[StackedStatelessParameters]

    @torch.no_grad()
    def __init__(self, members: Sequence[Boundaries]) -> None:
        assert len({batching_key(member) for member in members}) == 1
        self.config, self.first = members[0].config, members[0].first
        self.recorded_blocks = tuple(sorted({block for member in members for block in member.recorded_blocks}))
        like = members[0].injection_downs
        self.injection_columns = _own_columns([member.config.rank for member in members], like)
        gammas = [member.config.logit_interpolation for member in members]
        self.gammas = like.new_tensor([gamma or 0.0 for gamma in (*gammas, None)]) if any(gammas) else None
        self.update_columns: Tensor | None = None
        self.updates: Tensor | None = None
        """1 for adapters that update, (A + 1, 1); None if all do."""
        self.norm: tuple[Tensor, Tensor] | None = None
        if self.config.variant == "stateless":
            stateless = [cast(list[StatelessParameters], member.unstack()) for member in members]
            self.parameters = [_stack_stateless(parts) for parts in zip(*stateless, strict=True)]
            return
        unstacked = [cast(list[BoundaryParameters], member.unstack()) for member in members]
        scales = [member.config.alpha for member in members]
        self.parameters = [_stack(parts, scales) for parts in zip(*unstacked, strict=True)]
        last = [parts[-1] for parts in unstacked]
        widths = [0 if part.gate is None else part.gate.down.shape[1] for part in last]
        self.update_columns = _own_columns(widths, like).repeat(1, 2)
        updates = [part.transform is not None for part in last]
        if not all(updates):
            self.updates = like.new_tensor([[float(on)] for on in (*updates, False)])
        if self.config.update_norm and any(updates):
            ones, zeros = like.new_ones(like.shape[1]), like.new_zeros(like.shape[1])
            norms = [*((ones, zeros) if part.norm is None else part.norm for part in last), (ones, zeros)]
            self.norm = torch.stack([weight for weight, _ in norms]), torch.stack([bias for _, bias in norms])

    def for_sequences(self, owners: Sequence[int | None], tokens: int) -> "BatchedBoundaries":
        """Return the boundaries of a pass over (B, ``tokens``) tokens.

        Args:
            owners: for each of the B sequences the index of its adapter, or None.
            tokens: T, the length of the pass.
        """
        none = len(self.injection_columns) - 1
        device = self.injection_columns.device
        indices = torch.tensor([none if owner is None else owner for owner in owners], device=device)
        return BatchedBoundaries(self, indices.repeat_interleave(tokens))


class BatchedBoundaries:
    """The boundaries of one pass, a ``BoundaryModule`` for ``ShadowState``.

    Args:
        stack: the adapters' parameters.
        owners: (N,) the adapter of each token; the number of adapters for none.
    """

    def __init__(self, stack: AdapterStack, owners: Tensor) -> None:
        self.config, self.first, self.recorded_blocks = stack.config, stack.first, stack.recorded_blocks
        self._parameters, self._owners = stack.parameters, owners
        self._injection_columns = stack.injection_columns[owners]
        self._update_columns = None if stack.update_columns is None else stack.update_columns[owners]
        self._updates = None if stack.updates is None else stack.updates[owners]
        self._gammas = None if stack.gammas is None else stack.gammas[owners]
        self._norm = None if stack.norm is None else tuple(part[owners] for part in stack.norm)

    def unstack(self) -> list[StackedParameters] | list[StackedStatelessParameters]:
        """Return each boundary's parameters."""
        return self._parameters

    def apply_boundary(
        self,
        parameters: StackedParameters | StackedStatelessParameters,
        hidden_states: Tensor,
        shadow_states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply a boundary: h and s (B, T, d) to h' in the dtype of h and s' in that of the parameters."""
        if isinstance(parameters, StackedStatelessParameters):
            return self._apply_stateless(parameters, hidden_states), shadow_states
        assert shadow_states is not None
        p, (down, up, *_) = parameters, parameters.injection
        h = hidden_states.reshape(-1, hidden_states.shape[-1]).to(down.dtype)
        s = shadow_states.reshape(h.shape).to(down.dtype)
        if p.down is not None:
            s = self._update(h, s, p)
        inner = torch.mm(h - s, down).mul_(self._injection_columns)
        corrected = torch.addmm(h, inner, up)
        return corrected.to(hidden_states.dtype).view(hidden_states.shape), s.view(hidden_states.shape)

    def final_states(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head reads: h_L + gamma s0 (B, T, d) with the gamma of the token's adapter, 0 for none."""
        if self._gammas is None:
            return hidden_states
        assert initial_states is not None
        return interpolate(hidden_states, initial_states, self._gammas.view(*hidden_states.shape[:-1], 1))

    def _update(self, h: Tensor, s: Tensor, p: StackedParameters) -> Tensor:
        """Eq. 5-7."""
        assert p.down is not None and p.transform_up is not None and p.gate_up is not None
        assert self._update_columns is not None
        n = h
        if self._norm is not None:
            weight, bias = self._norm
            n = torch.addcmul(bias, F.layer_norm(h, h.shape[-1:], eps=EPSILON), weight)
        inner = n @ p.down if p.down_bias is None else torch.addmm(p.down_bias, n, p.down)
        inner = ACTIVATIONS[self.config.activation](inner).mul_(self._update_columns)
        width = p.gate_up.shape[0]
        t, g = inner[:, :width] @ p.transform_up, inner[:, width:] @ p.gate_up
        if p.up_biases is not None:
            t, g = t + p.up_biases[0][self._owners], g + p.up_biases[1][self._owners]
        g = g.sigmoid_()
        return torch.lerp(s, t, g if self._updates is None else g * self._updates)

    def _apply_stateless(self, parameters: StackedStatelessParameters, hidden_states: Tensor) -> Tensor:
        down, up, squares = parameters
        h = hidden_states.reshape(-1, hidden_states.shape[-1]).to(down.dtype)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        means = ((wide * wide) @ squares.to(wide.dtype)).gather(1, self._owners.unsqueeze(1))
        rstd = torch.rsqrt(means + RMS_EPSILON).to(h.dtype)
        corrected = torch.addmm(h, torch.mm(h, down).mul_(rstd).mul_(self._injection_columns), up)
        return corrected.to(hidden_states.dtype).view(hidden_states.shape)


def _stack(parts: Sequence[BoundaryParameters], scales: Sequence[float]) -> StackedParameters:
    """Concatenate one boundary of several adapters."""
    ups = [scale * part.injection.up for part, scale in zip(parts, scales, strict=True)]
    injection = Mlp(torch.cat([part.injection.down for part in parts], 1), torch.cat(ups))
    transforms = [part.transform for part in parts if part.transform is not None]
    gates = [part.gate for part in parts if part.gate is not None]
    if not transforms:
        return StackedParameters(injection)
    both = [*transforms, *gates]
    down_bias = up_biases = None
    if any(mlp.down_bias is not None for mlp in both):
        zeros = both[0].up.new_zeros
        down_bias = torch.cat([zeros(mlp.down.shape[1]) if mlp.down_bias is None else mlp.down_bias for mlp in both])
        up_biases = _up_biases([part.transform for part in parts]), _up_biases([part.gate for part in parts])
    return StackedParameters(
        injection,
        torch.cat([mlp.down for mlp in both], 1),
        down_bias,
        torch.cat([mlp.up for mlp in transforms]),
        torch.cat([mlp.up for mlp in gates]),
        up_biases,
    )


def _stack_stateless(parts: Sequence[StatelessParameters]) -> StackedStatelessParameters:
    """Concatenate one stateless boundary of several adapters."""
    squares = [part.channel_scales**2 / len(part.channel_scales) for part in parts]
    return StackedStatelessParameters(
        torch.cat([part.channel_scales.unsqueeze(1) * part.down for part in parts], 1),
        torch.cat([part.size * part.up for part in parts]),
        torch.stack([*squares, torch.zeros_like(squares[0])], 1),
    )


def _up_biases(mlps: Sequence[Mlp | None]) -> Tensor:
    """Biases of the up-projections, zeros where there is none, and a last row of zeros, (A + 1, d)."""
    known = next(mlp for mlp in mlps if mlp is not None)
    zeros = known.up.new_zeros(known.up.shape[1])
    return torch.stack([zeros if mlp is None or mlp.up_bias is None else mlp.up_bias for mlp in (*mlps, None)])


def _own_columns(widths: Sequence[int], like: Tensor) -> Tensor:
    """1 where a column belongs to an adapter, with a last row of zeros, (A + 1, sum of widths)."""
    return torch.cat([torch.block_diag(*(like.new_ones(1, width) for width in widths)), like.new_zeros(1, sum(widths))])
