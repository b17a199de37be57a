r"""The boundary between two decoder blocks: update of the shadow state, then injection into the next block.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7. Between block l and block l+1 stand one update and one
injection; they meet in the gap, so they are one operation (h, s) -> (h', s'):

    n  = LN(h)
    t  = T_l(n),  g = sigmoid(G_l(n))            two-layer MLPs                    (Eq. 5-6)
    s' = (1 - g) * s + g * t                                                       (Eq. 7)
    h' = h + alpha * Drop((h - s') W_down) W_up                                    (Eq. 2-4)

The first boundary only injects: no state has been refined before it. The update after the last block is read by nobody
and does not exist. Shapes: h, s are (..., d); W_down (d, r), W_up (r, d); T and G have the hidden width k.

Not in the paper: the variant "stateless", whose equations stand in ``injection.py``; and with ``config.head_mixing``
the head behind the last block sees h_L + gamma s0 outside of training.
"""

import torch
from torch import Tensor, nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.crossing import BoundaryParameters, Kernel, Mlp, cross
from shadowtune.core.injection import InjectionParameters, initial_std, inject, injection_scale


class Boundaries(nn.Module):
    """All boundaries of one shadow, their parameters stacked along the first axis.

    Args:
        count: number of boundaries: L - 1, or L with ``config.inject_first``.
        hidden_size: d, the width of the base.
        config: the shadow's settings.

    With ``config.channel_scaling``, row i of a boundary's W_down is used times ``channel_scales[boundary, i]``. The
    variant "stateless" has these scales always, and the size of each block's usual input in ``input_sizes``.

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
        stateless = config.variant == "stateless"
        updates = (min(count - 1, 1) if shared else count - 1) if config.update and not stateless else 0
        self.injection_downs = nn.Parameter(torch.empty(injections, d, r))
        self.injection_ups = nn.Parameter(torch.empty(injections, r, d))
        self.boundary_scales = nn.Parameter(torch.empty(count)) if shared else None
        self.channel_scales: Tensor | None
        self.register_buffer("channel_scales", torch.ones(count, d) if config.channel_scaling or stateless else None)
        self.input_sizes: Tensor | None
        self.register_buffer("input_sizes", torch.ones(count) if stateless else None)
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
        d, k = self.injection_downs.shape[1], self.config.update_width
        std = initial_std(d) if self.config.variant == "stateless" else self.config.init_std
        nn.init.normal_(self.injection_downs, std=std)
        nn.init.zeros_(self.injection_ups)
        if self.boundary_scales is not None:
            nn.init.ones_(self.boundary_scales)
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

    def forward(self, index: int, hidden_states: Tensor, shadow_states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cross boundary ``index``.

        Args:
            index: 0 <= index < count, counted from the base's input.
            hidden_states: h, the output of the block below, (..., d).
            shadow_states: s, the state so far, (..., d); the variant "stateless" does not look at it.

        Returns:
            h' in the dtype of ``hidden_states`` and s' in the dtype of the parameters, both (..., d); s as it is where
            the variant is "stateless".
        """
        return self.cross(self.split()[index], hidden_states, shadow_states)

    def cross(
        self,
        parameters: BoundaryParameters | InjectionParameters,
        hidden_states: Tensor,
        shadow_states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Cross the boundary with these parameters, one of ``split``; arguments and result as in ``forward``."""
        if isinstance(parameters, InjectionParameters):
            return inject(hidden_states, parameters, self.config, self.kernel, self.training), shadow_states
        assert shadow_states is not None
        return cross(hidden_states, shadow_states, parameters, self.config, self.kernel, self.training)

    @property
    def reads_states(self) -> bool:
        """Whether the attached model needs s0 for its output, as it is set now (training or evaluation)."""
        mixes = self.config.head_mixing is not None and not self.training
        return self.config.variant == "paper" or mixes

    def mix(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head sees: ``mixed`` states, and in training h_L as it is."""
        return hidden_states if self.training else self.mixed(hidden_states, initial_states)

    def mixed(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return h_L + gamma s0 in the dtype of h_L, both (..., d); h_L itself without a gamma."""
        gamma = self.config.head_mixing
        if gamma is None:
            return hidden_states
        assert initial_states is not None
        return mix(hidden_states, initial_states, gamma)

    def split(self) -> list[BoundaryParameters] | list[InjectionParameters]:
        """Return each boundary's parameters, views of the stacks.

        To be called once for all boundaries of a pass: a stack's gradient is then put together once. Slicing the stack
        at each boundary would make a gradient as large as the whole stack each time.
        """
        injections = _mlps(self.injection_downs, self.injection_ups)
        if self.input_sizes is not None:
            return self._split_stateless(injections)
        transforms = _mlps(
            self.transform_downs, self.transform_ups, self.transform_down_biases, self.transform_up_biases
        )
        gates = _mlps(self.gate_downs, self.gate_ups, self.gate_down_biases, self.gate_up_biases)
        scales = None if self.boundary_scales is None else self.boundary_scales.unbind()
        norm = None if self.norm_weight is None or self.norm_bias is None else (self.norm_weight, self.norm_bias)
        boundaries = []
        for index in range(self.count):
            injection = injections[index if scales is None else 0]
            if self.channel_scales is not None:
                injection = injection._replace(down=self.channel_scales[index, :, None] * injection.down)
            if scales is not None:
                injection = injection._replace(up=scales[index] * injection.up)
            if index == 0 or not transforms:
                boundaries.append(BoundaryParameters(injection))
            else:
                slot = index - 1 if scales is None else 0
                boundaries.append(BoundaryParameters(injection, transforms[slot], gates[slot], norm))
        return boundaries

    def _split_stateless(self, injections: list[Mlp]) -> list[InjectionParameters]:
        assert self.input_sizes is not None and self.channel_scales is not None
        sizes = self.input_sizes * injection_scale(self.config, self.count, self.injection_downs.shape[1])
        channels, shared = self.channel_scales.unbind(), self.boundary_scales
        boundaries = []
        for index, size in enumerate(sizes.unbind()):
            down, up, *_ = injections[index if shared is None else 0]
            up = up if shared is None else shared[index] * up
            boundaries.append(InjectionParameters(down, up, channels[index], size))
        return boundaries


def mix(hidden_states: Tensor, initial_states: Tensor, gamma: float | Tensor) -> Tensor:
    """Return h_L + gamma s0 in the dtype of h_L, both (..., d); gamma is one number, or one for each token (..., 1)."""
    return (hidden_states.to(initial_states.dtype) + gamma * initial_states).to(hidden_states.dtype)


def _mlps(
    downs: Tensor | None, ups: Tensor | None, down_biases: Tensor | None = None, up_biases: Tensor | None = None
) -> list[Mlp]:
    """Unbind stacks into one ``Mlp`` for each boundary; none if there are no stacks."""
    if downs is None or ups is None:
        return []
    if down_biases is None or up_biases is None:
        return [Mlp(*weights) for weights in zip(downs.unbind(), ups.unbind(), strict=True)]
    stacks = (downs, ups, down_biases, up_biases)
    return [Mlp(*weights) for weights in zip(*(stack.unbind() for stack in stacks), strict=True)]
