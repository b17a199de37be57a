r"""The boundary between two decoder blocks, (h, s) -> (h', s'): module, computation, and the state of one call.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 2-7. Between block l and block l+1 of the base, the shadow state s is
updated from the hidden state h, then h is corrected by a low-rank map of h - s (the injection):

    n  = LN(h)
    t  = T_l(n),  g = sigmoid(G_l(n))            two-layer MLPs                    (Eq. 5-6)
    s' = (1 - g) * s + g * t                                                       (Eq. 7)
    h' = h + alpha * Drop((h - s') W_down) W_up                                    (Eq. 2-4)

Shapes: h, s are (..., d); W_down (d, r), W_up (r, d); T and G have the hidden width k. The first boundary only injects,
because no update has run before it. An update after the last block would not be used, so it does not exist.

Not in the paper: the variant "stateless" (``stateless.py``), and logit interpolation: outside of training the head
reads h_L + gamma s0, with gamma = ``config.logit_interpolation``. Both networks share a linear head, so the logits are
the attached model's plus gamma times the shadow's.

``reference.py`` computes the same by plain loops in float64; ``kernels/`` has the fast operations.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.kernels.fused import FEW_TOKENS, FusedParameters, autocasts, fused_boundary, inference_boundary
from shadowtune.core.stateless import (
    StatelessParameters,
    apply_stateless_boundary,
    initial_std,
    injection_scale,
)
from shadowtune.errors import AttachError

Kernel = Literal["auto", "reference", "fused", "triton"]
"""Implementation of a boundary: the fastest that fits, plain torch operations, or the named one."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class Mlp(NamedTuple):
    """Weights of two layers: down (d, n) and up (n, d), each with or without a bias."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


class BoundaryParameters(NamedTuple):
    """Parameters of one boundary: W_down and W_up; if it updates, T, G and the norm's (weight, bias)."""

    injection: Mlp
    transform: Mlp | None = None
    gate: Mlp | None = None
    norm: tuple[Tensor, Tensor] | None = None


class BoundaryModule(Protocol):
    """What ``ShadowState`` needs: ``Boundaries``, or those of several adapters in one batch (``multi_adapter.py``)."""

    config: ShadowConfig
    first: int
    """Index of the block that the first boundary precedes."""
    recorded_blocks: tuple[int, ...]
    """Blocks whose inputs the state of a call keeps, for a draft head."""

    def unstack(self) -> list[Any]:
        """Return the parameters of each boundary."""

    def apply_boundary(
        self, parameters: Any, hidden_states: Tensor, shadow_states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the boundary with these parameters: (h, s) -> (h', s')."""

    def final_states(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head reads, from h_L and s0."""


class Boundaries(nn.Module):
    """All boundaries of one shadow, their parameters stacked along the first axis.

    Args:
        count: number of boundaries.
        hidden_size: d, the width of the base.
        config: the shadow's settings.
        first: index of the block that the first boundary precedes; the others follow block by block. 1 is the paper's;
            ``config.first_boundary`` gives that of a base.

    With ``config.channel_scaling``, row i of a boundary's W_down is multiplied by ``channel_scales[boundary, i]``. The
    variant "stateless" always has these scales, and the typical size of each block's input in ``input_sizes``.

    The parameters are used in their own dtype: h and s are cast to it and h' is returned in the dtype of h, so a
    bfloat16 base with float32 boundaries computes the boundaries in float32. Under autocast torch chooses the dtype.
    """

    def __init__(self, count: int, hidden_size: int, config: ShadowConfig, first: int = 1) -> None:
        super().__init__()
        self.config = config
        self.count = count
        self.first = first
        self.recorded_blocks: tuple[int, ...] = ()
        self.kernel: Kernel = "auto"
        self.dropout = nn.Dropout(config.dropout)
        """Holds the probability; never called. By its ``p`` trainers switch dropout off, as in any other module."""
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
        """Initialize as the paper does: W_down normal, W_up zero, T and G like ``nn.Linear``, the norm at identity."""
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
        """Apply boundary ``index``.

        Args:
            index: 0 <= index < count, counted from the base's input.
            hidden_states: h, the output of the block below, (..., d).
            shadow_states: s, the state so far, (..., d); not used by the variant "stateless".

        Returns:
            h' in the dtype of ``hidden_states`` and s' in the dtype of the parameters, both (..., d); the variant
            "stateless" returns s unchanged.
        """
        return self.apply_boundary(self.unstack()[index], hidden_states, shadow_states)

    def apply_boundary(
        self,
        parameters: BoundaryParameters | StatelessParameters,
        hidden_states: Tensor,
        shadow_states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the boundary with these parameters, an entry of ``unstack``; arguments and result as in ``forward``."""
        if self.injection_downs.device != hidden_states.device:  # the base's blocks are on several (device_map)
            parameters = _on_device(parameters, hidden_states.device)
        if shadow_states is not None:
            shadow_states = shadow_states.to(hidden_states.device)
        config, p = self.config, self.dropout.p
        if p != config.dropout:
            config = replace(config, dropout=p)
        if isinstance(parameters, StatelessParameters):
            injected = apply_stateless_boundary(hidden_states, parameters, config, self.kernel, self.training)
            return injected, shadow_states
        assert shadow_states is not None
        return apply_boundary(hidden_states, shadow_states, parameters, config, self.kernel, self.training)

    @property
    def reads_states(self) -> bool:
        """Whether the attached model's output depends on s0 in the current mode (training or evaluation)."""
        interpolates = self.config.logit_interpolation is not None and not self.training
        return self.config.variant == "paper" or interpolates

    def final_states(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return what the head reads: ``interpolated`` states in evaluation, h_L itself in training."""
        return hidden_states if self.training else self.interpolated(hidden_states, initial_states)

    def interpolated(self, hidden_states: Tensor, initial_states: Tensor | None) -> Tensor:
        """Return h_L + gamma s0 in the dtype of h_L, both (..., d); h_L itself without a gamma."""
        gamma = self.config.logit_interpolation
        if gamma is None:
            return hidden_states
        assert initial_states is not None
        return interpolate(hidden_states, initial_states, gamma)

    def unstack(self) -> list[BoundaryParameters] | list[StatelessParameters]:
        """Return each boundary's parameters, views of the stacks.

        Call it once for all boundaries of a forward pass: the gradient of a stack is then assembled once. Slicing the
        stack at each boundary would allocate a gradient of the whole stack each time.
        """
        injections = _mlps(self.injection_downs, self.injection_ups)
        if self.input_sizes is not None:
            return self._unstack_stateless(injections)
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

    def _unstack_stateless(self, injections: list[Mlp]) -> list[StatelessParameters]:
        assert self.input_sizes is not None and self.channel_scales is not None
        sizes = self.input_sizes * injection_scale(self.config, self.count, self.injection_downs.shape[1])
        channels, shared = self.channel_scales.unbind(), self.boundary_scales
        boundaries = []
        for index, size in enumerate(sizes.unbind()):
            down, up, *_ = injections[index if shared is None else 0]
            up = up if shared is None else shared[index] * up
            boundaries.append(StatelessParameters(down, up, channels[index], size))
        return boundaries


def interpolate(hidden_states: Tensor, initial_states: Tensor, gamma: float | Tensor) -> Tensor:
    """Return h_L + gamma s0 in the dtype of h_L, both (..., d); gamma is one number, or one for each token (..., 1)."""
    initial_states = initial_states.to(hidden_states.device)
    return (hidden_states.to(initial_states.dtype) + gamma * initial_states).to(hidden_states.dtype)


def _mlps(
    downs: Tensor | None, ups: Tensor | None, down_biases: Tensor | None = None, up_biases: Tensor | None = None
) -> list[Mlp]:
    """Unbind stacks into one ``Mlp`` for each boundary; an empty list without stacks."""
    if downs is None or ups is None:
        return []
    if down_biases is None or up_biases is None:
        return [Mlp(*weights) for weights in zip(downs.unbind(), ups.unbind(), strict=True)]
    stacks = (downs, ups, down_biases, up_biases)
    return [Mlp(*weights) for weights in zip(*(stack.unbind() for stack in stacks), strict=True)]


def apply_boundary(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: BoundaryParameters,
    config: ShadowConfig,
    kernel: Kernel = "auto",
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply one boundary (Eq. 2-7).

    Args:
        hidden_states: h (..., d).
        shadow_states: s (..., d).
        parameters: of this boundary, all of one dtype.
        config: the shadow's settings.
        kernel: "auto" takes Triton on CUDA devices; elsewhere the fused operation for gradients of many tokens, and
            ``inference_boundary`` without gradients. Plain torch operations compute the rest: other variants than the
            paper's, autocast, and compiled graphs, where torch fuses by itself.
        training: whether dropout is on.

    Returns:
        h' in the dtype of h and s' in the dtype of the parameters, both (..., d).
    """
    dtype = parameters.injection.down.dtype
    operation = _select_operation(hidden_states, parameters, config, kernel, training)
    if operation is not None:
        return _apply_operation(operation, hidden_states, shadow_states.to(dtype), parameters, config, training)
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
    return x @ weight if bias is None else x @ weight + bias


def _on_device(parameters: Any, device: torch.device) -> Any:
    """Return the parameters of a boundary, tensors in nested tuples, on a device."""
    if not isinstance(parameters, tuple):
        return None if parameters is None else parameters.to(device)
    parts = [_on_device(part, device) for part in parameters]
    return tuple(parts) if type(parameters) is tuple else type(parameters)(*parts)


Operation = Callable[..., tuple[Tensor, Tensor]]
"""A fast operation, with the signature of ``fused_boundary``."""


def _select_operation(
    h: Tensor, p: BoundaryParameters, config: ShadowConfig, kernel: Kernel, training: bool
) -> Operation | None:
    """Choose the fast operation for a call; None for plain torch operations."""
    paper = not config.update_bias and config.activation == "silu" and config.dropout_position == "rank"
    if kernel == "reference" or not paper or p.norm is None or torch.compiler.is_compiling():
        return None
    if autocasts(h.device.type):
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
def _triton() -> Operation:
    from shadowtune.core.kernels.triton_boundary import triton_boundary  # needs Triton, which CPU builds of torch lack

    return triton_boundary


def _apply_operation(
    operation: Operation, h: Tensor, s: Tensor, p: BoundaryParameters, config: ShadowConfig, training: bool
) -> tuple[Tensor, Tensor]:
    """Apply a fast operation, which takes matrices (N, d) and dropout masks."""
    assert p.transform is not None and p.gate is not None and p.norm is not None
    fused = FusedParameters(
        p.transform.down, p.transform.up, p.gate.down, p.gate.up, *p.norm, p.injection.down, p.injection.up
    )
    matrix = h.reshape(-1, h.shape[-1])
    states = s.reshape(matrix.shape)
    dropped = training and config.dropout > 0
    transform_mask = _mask(states, config.update_width, config) if dropped and config.transform_dropout else None
    injection_mask = _mask(states, config.rank, config) if dropped else None
    corrected, updated = operation(matrix, states, fused, config.alpha, transform_mask, injection_mask)
    return corrected.view(h.shape), updated.view(s.shape)


def _mask(like: Tensor, width: int, config: ShadowConfig) -> Tensor:
    return F.dropout(like.new_ones(like.shape[0], width), config.dropout)


class ShadowState:
    """The shadow state s of one forward call, with the boundaries that update it.

    Each forward call makes its own and passes it down as the keyword ``shadow``; nothing keeps it after the call. So
    threads do not interfere, an exception leaves nothing behind, and the call alone chooses its shadow.

    Args:
        boundaries: of the shadow.
        initial: s0 (B, T, d); None where the shadow's backbone has not run because nothing reads s0.
        cache: the caller's key-value cache of both networks, which the output of the call gets back.
    """

    __slots__ = (
        "attached_initial",
        "boundaries",
        "cache",
        "depth",
        "finalized",
        "initial",
        "injected",
        "lower",
        "parameters",
        "recorded",
        "value",
    )

    def __init__(self, boundaries: BoundaryModule, initial: Tensor | None, cache: Any = None) -> None:
        self.boundaries = boundaries
        self.parameters = boundaries.unstack()
        self.initial = initial
        self.cache = cache
        self.injected: Tensor | None = None
        """Which tokens get injections, (B, T, 1) bool; the others run as in the base. None injects into all."""
        self.lower: Tensor | None = None
        """Output (B, T, d) of the blocks below the first boundary, the same for every adapter."""
        self.recorded: dict[int, Tensor] = {}
        """Inputs (B, T, d) of the blocks of ``recorded_blocks``, without gradients."""
        joint = initial is None or boundaries.config.backbone_loss == "joint"
        self.attached_initial = initial if joint else cast(Tensor, initial).detach()
        """s0 as the attached model uses it: without a gradient where ``backbone_loss`` is "own"."""
        self.value = self.attached_initial
        self.depth = -1
        """The block that the state has been updated for; -1 before the first."""
        self.finalized = False

    def before_block(self, depth: int, hidden_states: Tensor) -> Tensor:
        """Apply the boundary in front of block ``depth`` (from 0); return the block's input, same shape and dtype.

        A second call for the same block returns its argument: several models may have their hooks on one base.

        Raises:
            AttachError: if the blocks do not run in order, each once.
        """
        if depth == self.depth:
            return hidden_states
        if depth != self.depth + 1:
            raise AttachError(
                f"block {depth} ran after block {self.depth}: something runs the base's blocks out of order or again; "
                "to recompute them in the backward pass use model.activation_checkpointing_enable()"
            )
        self.depth = depth
        if depth == self.boundaries.first:
            self.lower = hidden_states
        if depth >= self.boundaries.first:
            parameters = self.parameters[depth - self.boundaries.first]
            corrected, self.value = self.boundaries.apply_boundary(parameters, hidden_states, self.value)
            hidden_states = self._select(corrected, hidden_states)
        if depth in self.boundaries.recorded_blocks:
            self.recorded[depth] = hidden_states.detach()
        return hidden_states

    def finalize(self, blocks: int, hidden_states: Tensor) -> Tensor:
        """Return what the head reads, from the base's last hidden states; same shape and dtype.

        A second call returns its argument, as for ``before_block``.

        Raises:
            AttachError: unless the last of ``blocks`` blocks has run.
        """
        if self.finalized:
            return hidden_states
        if self.depth != blocks - 1:
            raise AttachError(
                f"the shadow reached {self.depth + 1} of {blocks} blocks: this base does not hand unknown keywords "
                "down to its blocks, or skips some of them (layer dropout)"
            )
        self.finalized = True
        return self._select(self.boundaries.final_states(hidden_states, self.attached_initial), hidden_states)

    def _select(self, corrected: Tensor, hidden_states: Tensor) -> Tensor:
        return corrected if self.injected is None else torch.where(self.injected, corrected, hidden_states)
