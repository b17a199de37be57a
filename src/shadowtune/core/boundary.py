r"""The boundary between two decoder blocks: update of the shadow state, then injection into the next block.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7. Between block l and block l+1 stand one update and one
injection; they meet in the gap, so they are one operation (h, s) -> (h', s'):

    n  = LN(h)
    t  = T_l(n),  g = sigmoid(G_l(n))            two-layer MLPs                    (Eq. 5-6)
    s' = (1 - g) * s + g * t                                                       (Eq. 7)
    h' = h + alpha * Drop((h - s') W_down) W_up                                    (Eq. 2-4)

The first boundary only injects: no state has been refined before it. The update after the last block is read by nobody
and does not exist. Shapes: h, s are (..., d); W_down (d, r), W_up (r, d); T and G have the hidden width k.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.fused import BoundaryParameters, fused_boundary

Kernel = Literal["auto", "reference", "fused", "triton"]
"""How boundaries are computed: by the fastest operation that fits, step by step, or by the one named."""
Crossing = Callable[..., tuple[Tensor, Tensor]]
"""A fast operation, called like ``fused_boundary``."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class Boundaries(nn.Module):
    """All boundaries of one shadow, their parameters stacked along the first axis.

    Args:
        count: number of boundaries: L - 1, or L with ``config.inject_first``.
        hidden_size: d, the width of the base.
        config: the shadow's settings.

    The parameters are used in their own dtype: (h, s) is brought to it and h' is returned in the dtype of h, so a
    bfloat16 base with float32 boundaries computes the boundaries in float32. Under autocast torch decides.
    """

    def __init__(self, count: int, hidden_size: int, config: ShadowConfig) -> None:
        super().__init__()
        self.config = config
        self.count = count
        self.kernel: Kernel = "auto"
        d, r, k = hidden_size, config.rank, config.update_width
        shared = config.depth_sharing == "full"
        injections = min(count, 1) if shared else count
        updates = (min(count - 1, 1) if shared else count - 1) if config.update else 0
        self.injection_downs = nn.Parameter(torch.empty(injections, d, r))
        self.injection_ups = nn.Parameter(torch.empty(injections, r, d))
        self.boundary_scales = nn.Parameter(torch.empty(count)) if shared else None
        self.transform_downs = self.transform_ups = self.gate_downs = self.gate_ups = None
        self.transform_down_biases = self.transform_up_biases = None
        self.gate_down_biases = self.gate_up_biases = None
        self.norm_weight = self.norm_bias = None
        if updates > 0:
            self.transform_downs = nn.Parameter(torch.empty(updates, d, k))
            self.transform_ups = nn.Parameter(torch.empty(updates, k, d))
            self.gate_downs = nn.Parameter(torch.empty(updates, d, k))
            self.gate_ups = nn.Parameter(torch.empty(updates, k, d))
            if config.update_bias:
                self.transform_down_biases = nn.Parameter(torch.empty(updates, k))
                self.transform_up_biases = nn.Parameter(torch.empty(updates, d))
                self.gate_down_biases = nn.Parameter(torch.empty(updates, k))
                self.gate_up_biases = nn.Parameter(torch.empty(updates, d))
            if config.update_norm:
                self.norm_weight = nn.Parameter(torch.empty(d))
                self.norm_bias = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the paper does: W_down normal, W_up zero, T and G like ``nn.Linear``, the norm at identity."""
        nn.init.normal_(self.injection_downs, std=self.config.init_std)
        nn.init.zeros_(self.injection_ups)
        if self.boundary_scales is not None:
            nn.init.ones_(self.boundary_scales)
        d, k = self.injection_downs.shape[1], self.config.update_width
        inputs = {
            d: (self.transform_downs, self.transform_down_biases, self.gate_downs, self.gate_down_biases),
            k: (self.transform_ups, self.transform_up_biases, self.gate_ups, self.gate_up_biases),
        }
        for fan_in, parameters in inputs.items():
            for parameter in parameters:
                if parameter is not None:  # nn.Linear draws weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in))
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(self, index: int, hidden_states: Tensor, shadow_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cross boundary ``index``.

        Args:
            index: 0 <= index < count, counted from the base's input.
            hidden_states: h, the output of the block below, (..., d).
            shadow_states: s, the state so far, (..., d).

        Returns:
            h' in the dtype of ``hidden_states`` and s' in the dtype of the parameters, both (..., d).
        """
        if index > 0 and self._fuses(hidden_states):
            return self._cross_fused(index, hidden_states, shadow_states.to(self.injection_downs.dtype))
        h = hidden_states.to(self.injection_downs.dtype)
        s = shadow_states.to(self.injection_downs.dtype)
        if index > 0 and self.transform_downs is not None:
            s = self._update(0 if len(self.transform_downs) == 1 else index - 1, h, s)
        return hidden_states + self._correction(index, h, s).to(hidden_states.dtype), s

    def _fuses(self, hidden_states: Tensor) -> bool:
        """Whether the fused operation computes this call: it knows the paper's variant, and decides dtypes itself."""
        c = self.config
        paper = c.update_norm and not c.update_bias and c.activation == "silu" and c.dropout_position == "rank"
        plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(hidden_states.device.type)
        return self.kernel != "reference" and paper and plain and self.transform_downs is not None

    def _cross_fused(self, index: int, hidden_states: Tensor, shadow_states: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary ``index`` as one operation on (N, d) rows."""
        assert self.transform_downs is not None and self.transform_ups is not None
        assert self.gate_downs is not None and self.gate_ups is not None
        assert self.norm_weight is not None and self.norm_bias is not None
        update = 0 if len(self.transform_downs) == 1 else index - 1
        slot = 0 if len(self.injection_downs) == 1 else index
        up = self.injection_ups[slot]
        parameters = BoundaryParameters(
            self.transform_downs[update],
            self.transform_ups[update],
            self.gate_downs[update],
            self.gate_ups[update],
            self.norm_weight,
            self.norm_bias,
            self.injection_downs[slot],
            up if self.boundary_scales is None else self.boundary_scales[index] * up,
        )
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        states = shadow_states.reshape(rows.shape)
        dropped = self.training and self.config.dropout > 0
        transform_mask = (
            self._mask(states, self.config.update_width) if dropped and self.config.transform_dropout else None
        )
        injection_mask = self._mask(states, self.config.rank) if dropped else None
        kernel = self.kernel if self.kernel != "auto" else _fastest(rows.device.type)
        cross = CROSSINGS[kernel]()
        h, s = cross(rows, states, parameters, self.config.alpha, transform_mask, injection_mask)
        return h.view(hidden_states.shape), s.view(shadow_states.shape)

    def _mask(self, rows: Tensor, width: int) -> Tensor:
        """What dropout multiplies (N, width) numbers by."""
        return F.dropout(rows.new_ones(rows.shape[0], width), self.config.dropout, True)

    def _update(self, slot: int, h: Tensor, s: Tensor) -> Tensor:
        """Eq. 5-7 with the parameters of ``slot``."""
        assert self.transform_downs is not None and self.transform_ups is not None
        assert self.gate_downs is not None and self.gate_ups is not None
        n = h
        if self.norm_weight is not None:
            n = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        activation = ACTIVATIONS[self.config.activation]
        inner = activation(_affine(n, self.transform_downs[slot], _at(self.transform_down_biases, slot)))
        if self.config.transform_dropout:
            inner = F.dropout(inner, self.config.dropout, self.training)
        t = _affine(inner, self.transform_ups[slot], _at(self.transform_up_biases, slot))
        inner = activation(_affine(n, self.gate_downs[slot], _at(self.gate_down_biases, slot)))
        g = torch.sigmoid(_affine(inner, self.gate_ups[slot], _at(self.gate_up_biases, slot)))
        return torch.lerp(s, t.to(s.dtype), g.to(s.dtype))

    def _correction(self, index: int, h: Tensor, s: Tensor) -> Tensor:
        """Alpha * Drop((h - s) W_down) W_up of Eq. 2-4."""
        slot = 0 if len(self.injection_downs) == 1 else index
        delta = h - s
        if self.config.dropout_position == "hidden":
            delta = F.dropout(delta, self.config.dropout, self.training)
        inner = delta @ self.injection_downs[slot]
        if self.config.dropout_position == "rank":
            inner = F.dropout(inner, self.config.dropout, self.training)
        scale = self.config.alpha
        if self.boundary_scales is not None:
            inner = inner * self.boundary_scales[index]
        return scale * (inner @ self.injection_ups[slot])


def _triton() -> Crossing:
    from shadowtune.core.triton_boundary import triton_boundary  # needs Triton, which CPU builds of torch lack

    return triton_boundary


CROSSINGS: dict[str, Callable[[], Crossing]] = {"fused": lambda: fused_boundary, "triton": _triton}


@functools.cache
def _fastest(device_type: str) -> str:
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") is not None else "fused"


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X W (+ b), with W stored (inputs, outputs)."""
    return x @ weight if bias is None else x @ weight + bias


def _at(stack: Tensor | None, slot: int) -> Tensor | None:
    return None if stack is None else stack[slot]
