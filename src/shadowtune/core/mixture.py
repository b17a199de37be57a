r"""Boundaries of several shadows side by side: one crossing for rows of different shadows, without gradients.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7, for N tokens of which each belongs to one of A shadows:

    n  = LN(h) * w_a + b_a
    t  = (M_k silu(n [T_1 | ... | T_A])) [T'_1; ...; T'_A],   g likewise
    s' = (1 - g) * s + g * t
    h' = h + (M_r ((h - s') [D_1 | ... | D_A])) [alpha_1 U_1; ...; alpha_A U_A]
    and in front of the head  h_L + gamma_a s0

M_r (N, sum of r) and M_k (N, sum of k) are 1 in the columns of the token's own shadow and 0 elsewhere. What is not a
token's own is multiplied by 0, so each gets what it would get alone, whatever the ranks; and the operations are as many
as for one shadow. Tokens of no shadow have no columns, and pass as they are. The variant "stateless" stands in
``injection_mixture.py``.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.boundary import Boundaries, mix
from shadowtune.core.crossing import ACTIVATIONS, BoundaryParameters, Mlp
from shadowtune.core.fused import EPSILON


class MixedParameters(NamedTuple):
    """What one boundary needs of all shadows: D (d, R) and U (R, d), alpha in it; T and G, if any of them updates."""

    injection: Mlp
    down: Tensor | None = None
    """Of T, then of G, (d, 2K)."""
    down_bias: Tensor | None = None
    """(2K,), None if no shadow has one."""
    transform_up: Tensor | None = None
    """(K, d)."""
    gate_up: Tensor | None = None
    up_biases: tuple[Tensor, Tensor] | None = None
    """Of T and G, a line for each shadow and one for none, (A + 1, d)."""


def mixing_key(boundaries: Boundaries) -> Hashable:
    """Return what two shadows of one base must have in common to be crossed together."""
    config, downs = boundaries.config, boundaries.injection_downs
    kind = (config.variant, config.activation, config.inject_first, config.update_norm)
    return (boundaries.count, downs.dtype, downs.device, *kind)


class Mixture:
    """Boundaries side by side; made once for each set of shadows.

    Args:
        members: boundaries of one base, of one ``mixing_key``. They are copied: later changes are not seen.
    """

    @torch.no_grad()
    def __init__(self, members: Sequence[Boundaries]) -> None:
        assert len({mixing_key(member) for member in members}) == 1
        self.config = members[0].config
        self.activation = ACTIVATIONS[self.config.activation]
        split = [cast(list[BoundaryParameters], member.split()) for member in members]
        scales = [member.config.alpha for member in members]
        self.parameters = [_side_by_side(parts, scales) for parts in zip(*split, strict=True)]
        last = [parts[-1] for parts in split]
        like = members[0].injection_downs
        widths = [0 if part.gate is None else part.gate.down.shape[1] for part in last]
        self.injection_columns = own_columns([part.injection.down.shape[1] for part in last], like)
        self.update_columns = own_columns(widths, like).repeat(1, 2)
        updates = [part.transform is not None for part in last]
        self.updates = None if all(updates) else like.new_tensor([[float(on)] for on in (*updates, False)])
        gammas = [member.config.head_mixing for member in members]
        self.head_mixing = like.new_tensor([gamma or 0.0 for gamma in (*gammas, None)]) if any(gammas) else None
        self.norm: tuple[Tensor, Tensor] | None = None
        if self.config.update_norm and any(updates):
            ones, zeros = like.new_ones(like.shape[1]), like.new_zeros(like.shape[1])
            norms = [*((ones, zeros) if part.norm is None else part.norm for part in last), (ones, zeros)]
            self.norm = torch.stack([weight for weight, _ in norms]), torch.stack([bias for _, bias in norms])

    def of_rows(self, owners: Sequence[int | None], tokens: int) -> "MixedBoundaries":
        """Return the boundaries of a pass over (B, ``tokens``) tokens; each row belongs to a member or to none."""
        nobody = len(self.injection_columns) - 1
        device = self.injection_columns.device
        indices = torch.tensor([nobody if owner is None else owner for owner in owners], device=device)
        return MixedBoundaries(self, indices.repeat_interleave(tokens))


class MixedBoundaries:
    """The boundaries of one pass, in the place of a shadow's own ``Boundaries`` in ``ShadowState``.

    Args:
        mixture: the stacks.
        owners: (N,) the member that each token belongs to, the number of members for none.
    """

    def __init__(self, mixture: Mixture, owners: Tensor) -> None:
        self.config = mixture.config
        self._mixture, self._owners = mixture, owners
        self._injection_columns = mixture.injection_columns[owners]
        self._update_columns = mixture.update_columns[owners]
        self._updates = None if mixture.updates is None else mixture.updates[owners]
        self._head_mixing = None if mixture.head_mixing is None else mixture.head_mixing[owners]
        self._norm = None if mixture.norm is None else tuple(part[owners] for part in mixture.norm)

    def split(self) -> list[MixedParameters]:
        """Return each boundary's parameters."""
        return self._mixture.parameters

    def cross(
        self, parameters: MixedParameters, hidden_states: Tensor, shadow_states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cross a boundary: h and s (B, T, d) to h' in the dtype of h and s' in that of the parameters."""
        assert shadow_states is not None
        p, (down, up, *_) = parameters, parameters.injection
        h = hidden_states.reshape(-1, hidden_states.shape[-1]).to(down.dtype)
        s = shadow_states.reshape(h.shape).to(down.dtype)
        if p.down is not None:
            s = self._update(h, s, p)
        inner = torch.mm(h - s, down).mul_(self._injection_columns)
        crossed = torch.addmm(h, inner, up)
        return crossed.to(hidden_states.dtype).view(hidden_states.shape), s.view(hidden_states.shape)

    def mix(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head sees: h_L + gamma s0 (B, T, d), gamma being that of the token's shadow, 0 for none."""
        if self._head_mixing is None:
            return hidden_states
        assert initial_states is not None
        return mix(hidden_states, initial_states, self._head_mixing.view(*hidden_states.shape[:-1], 1))

    def _update(self, h: Tensor, s: Tensor, p: MixedParameters) -> Tensor:
        """Eq. 5-7."""
        assert p.down is not None and p.transform_up is not None and p.gate_up is not None
        n = h
        if self._norm is not None:
            weight, bias = self._norm
            n = torch.addcmul(bias, F.layer_norm(h, h.shape[-1:], eps=EPSILON), weight)
        inner = n @ p.down if p.down_bias is None else torch.addmm(p.down_bias, n, p.down)
        inner = self._mixture.activation(inner).mul_(self._update_columns)
        width = p.gate_up.shape[0]
        t, g = inner[:, :width] @ p.transform_up, inner[:, width:] @ p.gate_up
        if p.up_biases is not None:
            t, g = t + p.up_biases[0][self._owners], g + p.up_biases[1][self._owners]
        g = g.sigmoid_()
        return torch.lerp(s, t, g if self._updates is None else g * self._updates)


def _side_by_side(parts: Sequence[BoundaryParameters], scales: Sequence[float]) -> MixedParameters:
    """Join one boundary of several shadows."""
    ups = [scale * part.injection.up for part, scale in zip(parts, scales, strict=True)]
    injection = Mlp(torch.cat([part.injection.down for part in parts], 1), torch.cat(ups))
    transforms = [part.transform for part in parts if part.transform is not None]
    gates = [part.gate for part in parts if part.gate is not None]
    if not transforms:
        return MixedParameters(injection)
    both = [*transforms, *gates]
    down_bias = up_biases = None
    if any(mlp.down_bias is not None for mlp in both):
        zeros = both[0].up.new_zeros
        down_bias = torch.cat([zeros(mlp.down.shape[1]) if mlp.down_bias is None else mlp.down_bias for mlp in both])
        up_biases = _lines([part.transform for part in parts]), _lines([part.gate for part in parts])
    return MixedParameters(
        injection,
        torch.cat([mlp.down for mlp in both], 1),
        down_bias,
        torch.cat([mlp.up for mlp in transforms]),
        torch.cat([mlp.up for mlp in gates]),
        up_biases,
    )


def _lines(mlps: Sequence[Mlp | None]) -> Tensor:
    """Biases of the way up, 0 where there is none, and a last line of zeros, (A + 1, d)."""
    known = next(mlp for mlp in mlps if mlp is not None)
    zeros = known.up.new_zeros(known.up.shape[1])
    return torch.stack([zeros if mlp is None or mlp.up_bias is None else mlp.up_bias for mlp in (*mlps, None)])


def own_columns(widths: Sequence[int], like: Tensor) -> Tensor:
    """1 where a column belongs to a member, a last line without any, (A + 1, sum of widths)."""
    return torch.cat([torch.block_diag(*(like.new_ones(1, width) for width in widths)), like.new_zeros(1, sum(widths))])
