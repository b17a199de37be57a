r"""Reference implementation: ShadowPEFT as plain loops in float64, against which every fast path is tested.

It shares nothing with the fast code but the parameters and the settings. Equations of
https://arxiv.org/abs/2604.19254.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig

RANK_EXPONENT = 1.0
"""p of ``stateless.py``, repeated here on purpose."""


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis, eps 1e-5."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def activate(x: Tensor, name: str) -> Tensor:
    """SiLU or the exact GELU, written out."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, p: Mapping[str, Tensor], which: str, slot: int, activation: str) -> Tensor:
    """T (``which`` = "transform") or G before its sigmoid ("gate"): down, activation, up."""
    inner = x @ p[f"{which}_downs"][slot]
    if f"{which}_down_biases" in p:
        inner = inner + p[f"{which}_down_biases"][slot]
    outer = activate(inner, activation) @ p[f"{which}_ups"][slot]
    if f"{which}_up_biases" in p:
        outer = outer + p[f"{which}_up_biases"][slot]
    return outer


def stateless(index: int, h: Tensor, p: Mapping[str, Tensor], config: ShadowConfig) -> Tensor:
    """One stateless boundary without dropout, h -> h' (``stateless.py``), token by token."""
    boundaries, d = p["channel_scales"].shape
    slot = 0 if config.depth_sharing == "full" else index
    f = config.alpha * (16 / config.rank) ** RANK_EXPONENT * (30 / boundaries) * (576 / d)
    if config.depth_sharing == "full":
        f = f * p["boundary_scales"][index]
    corrected = []
    for token in h.reshape(-1, d):
        scaled = p["channel_scales"][index] * token
        x = scaled / torch.sqrt((scaled**2).sum() / d + 1e-6)
        correction = x @ p["injection_downs"][slot] @ p["injection_ups"][slot]
        corrected.append(token + f * p["input_sizes"][index] * correction)
    return torch.stack(corrected).reshape(h.shape)


def boundary(index: int, h: Tensor, s: Tensor, p: Mapping[str, Tensor], config: ShadowConfig) -> tuple[Tensor, Tensor]:
    """One boundary without dropout, (h, s) -> (h', s'); ``p`` are the stacked parameters by name (Eq. 2-7)."""
    if config.variant == "stateless":
        return stateless(index, h, p, config), s
    shared = config.depth_sharing == "full"
    if config.update and index > 0:
        slot = 0 if shared else index - 1
        n = norm(h, p["norm_weight"], p["norm_bias"]) if config.update_norm else h
        t = mlp(n, p, "transform", slot, config.activation)
        g = 1 / (1 + torch.exp(-mlp(n, p, "gate", slot, config.activation)))
        s = (1 - g) * s + g * t
    slot = 0 if shared else index
    delta = h - s
    if config.channel_scaling:
        delta = delta * p["channel_scales"][index]
    correction = delta @ p["injection_downs"][slot] @ p["injection_ups"][slot]
    if shared:
        correction = p["boundary_scales"][index] * correction
    return h + config.alpha * correction, s


def stack(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    embedded: Tensor,
    initial: Tensor,
    p: Mapping[str, Tensor],
    config: ShadowConfig,
    shared: Sequence[int] | None = None,
) -> Tensor:
    """The whole attached stack: embeddings and s0 in, output of the last block out.

    ``shared`` is the number of each sequence's leading tokens without injections (``shared_prompt.py``).
    """
    h, s = embedded, initial
    first = config.first_boundary(len(blocks))
    for depth, block in enumerate(blocks):
        if depth >= first:
            corrected, s = boundary(depth - first, h, s, p, config)
            lengths = [0] * len(h) if shared is None else shared
            h = torch.stack([torch.cat([h[row, :n], corrected[row, n:]]) for row, n in enumerate(lengths)])
        h = block(h)
    return h


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled positions of -log softmax(logits)[next token]; logits (B, T, V), labels (B, T)."""
    total, count = logits.new_zeros(()), 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            target = int(labels[row, position + 1])
            if target != -100:
                z = logits[row, position]
                total = total + torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[target]
                count += 1
    return total / max(count, 1)
