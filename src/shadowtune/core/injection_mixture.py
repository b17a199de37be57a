r"""Stateless boundaries of several shadows side by side: one pass for rows of different shadows, without gradients.

The boundary of ``injection.py`` for N tokens of which each belongs to one of A shadows:

    rstd_a = (mean((c_a * h)^2) + eps)^-1/2            all A at once: (h * h) [c_1^2 | ... | c_A^2] / d
    h' = h + (M ((h [c_1 D_1 | ... | c_A D_A]) rstd_a)) [f_1 m_1 U_1; ...; f_A m_A U_A]

M (N, sum of r) is 1 in the columns of the token's own shadow and 0 elsewhere, as in ``mixture.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from shadowtune.core.boundary import Boundaries, mix
from shadowtune.core.injection import EPSILON, InjectionParameters
from shadowtune.core.mixture import own_columns


class SideBySide(NamedTuple):
    """What one boundary needs of all shadows."""

    down: Tensor
    """[c_1 D_1 | ... | c_A D_A] (d, R)."""
    up: Tensor
    """[f_1 m_1 U_1; ...; f_A m_A U_A] (R, d)."""
    squares: Tensor
    """c_a^2 / d of each shadow, and 0 for none (d, A + 1)."""


class InjectionMixture:
    """Stateless boundaries side by side; made once for each set of shadows.

    Args:
        members: boundaries of one base, of one ``mixing_key``. They are copied: later changes are not seen.
    """

    @torch.no_grad()
    def __init__(self, members: Sequence[Boundaries]) -> None:
        self.config = members[0].config
        like = members[0].injection_downs
        split = [cast(list[InjectionParameters], member.split()) for member in members]
        self.parameters = [_side_by_side(parts) for parts in zip(*split, strict=True)]
        self.columns = own_columns([member.config.rank for member in members], like)
        gammas = [member.config.head_mixing for member in members]
        self.head_mixing = like.new_tensor([gamma or 0.0 for gamma in (*gammas, None)]) if any(gammas) else None

    def of_rows(self, owners: Sequence[int | None], tokens: int) -> "MixedInjections":
        """Return the boundaries of a pass over (B, ``tokens``) tokens; each row belongs to a member or to none."""
        nobody, device = len(self.columns) - 1, self.columns.device
        indices = torch.tensor([nobody if owner is None else owner for owner in owners], device=device)
        return MixedInjections(self, indices.repeat_interleave(tokens))


class MixedInjections:
    """The boundaries of one pass, in the place of a shadow's own ``Boundaries`` in ``ShadowState``.

    Args:
        mixture: the stacks.
        owners: (N,) the member that each token belongs to, the number of members for none.
    """

    def __init__(self, mixture: InjectionMixture, owners: Tensor) -> None:
        self.config = mixture.config
        self._parameters, self._owners = mixture.parameters, owners.unsqueeze(1)
        self._columns = mixture.columns[owners]
        self._head_mixing = None if mixture.head_mixing is None else mixture.head_mixing[owners]

    def split(self) -> list[SideBySide]:
        """Return each boundary's parameters."""
        return self._parameters

    def cross(
        self, parameters: SideBySide, hidden_states: Tensor, shadow_states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply a boundary: h (B, T, d) to h' in the dtype of h; s as it is."""
        down, up, squares = parameters
        h = hidden_states.reshape(-1, hidden_states.shape[-1]).to(down.dtype)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        means = ((wide * wide) @ squares.to(wide.dtype)).gather(1, self._owners)
        rstd = torch.rsqrt(means + EPSILON).to(h.dtype)
        injected = torch.addmm(h, torch.mm(h, down).mul_(rstd).mul_(self._columns), up)
        return injected.to(hidden_states.dtype).view(hidden_states.shape), shadow_states

    def mix(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head sees: h_L + gamma s0 (B, T, d), gamma being that of the token's shadow, 0 for none."""
        if self._head_mixing is None:
            return hidden_states
        assert initial_states is not None
        return mix(hidden_states, initial_states, self._head_mixing.view(*hidden_states.shape[:-1], 1))


def _side_by_side(parts: Sequence[InjectionParameters]) -> SideBySide:
    """Join one boundary of several shadows."""
    squares = [part.channel_scales**2 / len(part.channel_scales) for part in parts]
    return SideBySide(
        torch.cat([part.channel_scales.unsqueeze(1) * part.down for part in parts], 1),
        torch.cat([part.size * part.up for part in parts]),
        torch.stack([*squares, torch.zeros_like(squares[0])], 1),
    )
