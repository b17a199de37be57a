r"""Fused linear cross-entropy of two networks behind one frozen head: one pass over tiles of the vocabulary.

The cross-entropies of the attached model (h) and of the shadow (s), and the divergence between them, need three
quantities of each vector x: log Z = log sum_v exp(x . w_v), the logit of the target, and the expected head row
mu = sum_v p_v w_v:

    CE(x, y)     = log Z - x . w_y                                 d/dx = mu - w_y
    KL(p_h, p_s) = sum_v p_v (a_v - b_v) - log Z_h + log Z_s       d/ds = mu_s - mu_h

with a and b the logits of h and s. The head wants no gradient, so these are all that the backward pass needs. The
vocabulary is cut into tiles of some thousand tokens, and each sum runs over the tiles with a running maximum
(https://arxiv.org/abs/1805.02867): the (N, V) logits never exist, each row of the head is read once for both networks,
and the divergence costs no further product, because the cross-entropies have made both expected rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shadowtune.core.kernels.fused import autocasts

TILE_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a tile: 32 MB of float32 fit a CPU's cache, a GPU needs larger products."""
NARROWEST_TILE = 512
"""Smallest number of tokens in a tile; products of fewer are slow."""

LogitsTransform = Callable[[Tensor], Tensor]
"""Elementwise function of the logits after the head's product: soft-capping or scaling."""


class Head(NamedTuple):
    """A head of V logits."""

    apply: Callable[[Tensor], Tensor]
    """(..., d) -> (..., V)."""
    weight: Tensor | None = None
    """(V, d) of a linear head that gets no gradient; None if only ``apply`` is known."""
    bias: Tensor | None = None
    """(V,)."""
    logits_transform: LogitsTransform | None = None
    """Applied after the product; part of ``apply``."""


def product_dtype(head: Head) -> torch.dtype:
    """Return the dtype of products with the head's weight, which must be known: autocast's, or that of the weight."""
    assert head.weight is not None
    device = head.weight.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) else head.weight.dtype


def fused_linear_cross_entropy(
    head: Head, h: Tensor, s: Tensor | None, targets: Tensor, kept: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the sums over the kept rows of CE(h), CE(s) and temperature^2 KL(h || s).

    Args:
        head: of both networks; its weight must be known.
        h: (N, d).
        s: (N, d), or None.
        targets: (N,), any number >= 0 in rows that are not kept.
        kept: (N,) booleans.
        temperature: of the divergence, which is left out if None. Its gradient goes to s alone.

    Returns:
        Scalars, at least float32; None for what was left out. They have no second derivatives.
    """
    sums: tuple[Tensor, Tensor | None, Tensor | None] = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        head, h, s, targets, kept, temperature
    )
    return sums


def at_least_float32(x: Tensor) -> Tensor:
    """Cast 16-bit numbers to float32; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes the rows' gradients in the forward pass and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        h: Tensor,
        s: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        temperature: float | None,
    ) -> tuple[Tensor | None, ...]:
        with_gradients = h.requires_grad or (s is not None and s.requires_grad)
        networks, n = (1 if s is None else 2), len(targets)
        x = torch.cat([h] if s is None else [h, s.to(h.dtype)]).to(product_dtype(head))
        statistics = _tiled_statistics(head, x, n, temperature, with_gradients)
        kept = kept.unsqueeze(1)
        ids = targets.repeat(networks)
        entropy, entropy_gradient = _cross_entropies(head, x, ids, statistics.softmax)
        sums: list[Tensor | None] = [*(entropy.view(networks, n, 1) * kept).sum((1, 2))]
        gradients: list[Tensor | None] = []
        if with_gradients:
            gradients = [*(entropy_gradient.view(networks, n, x.shape[1]) * kept).to(h.dtype)]
        if statistics.gap is not None and temperature is not None:
            p, log_total = statistics.tempered.total[:n], statistics.tempered.log_total()
            divergence = statistics.gap / p - log_total[:n] + log_total[n:]
            sums.append(temperature**2 * (divergence * kept).sum())
            if with_gradients:
                mean = statistics.tempered.mean()
                gradients.append((temperature * (mean[n:] - mean[:n]) * kept).to(h.dtype))
        ctx.save_for_backward(*gradients)
        return tuple(sums + [None] * (3 - len(sums)))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The first kept gradient is that of h, the others are those of s."""
        scaled = [g * up.to(g.dtype) for g, up in zip(ctx.saved_tensors, outer, strict=False)]
        return None, scaled[0], sum(scaled[2:], scaled[1]) if len(scaled) > 1 else None, None, None, None


class OnlineSoftmax:
    """log Z and expected head rows of (M, V) logits that arrive a tile of columns at a time."""

    def __init__(self, rows: Tensor, with_gradients: bool) -> None:
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.maximum = rows.new_full((len(rows), 1), float("-inf"), dtype=wide)
        self.total = rows.new_zeros(len(rows), 1, dtype=wide)
        self.sums = rows.new_zeros(rows.shape if with_gradients else (0, 0), dtype=wide)
        self.with_gradients = with_gradients

    def add(self, logits: Tensor, weight: Tensor, slope: Tensor | None) -> Tensor:
        """Add a tile.

        Args:
            logits: (M, t), overwritten by their exponentials less the running maximum.
            weight: (t, d), the head's rows.
            slope: (M, t), derivative of the logits by the product x . w_v; None if it is 1.

        Returns:
            (M, 1), by which sums of earlier tiles have to be multiplied.
        """
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        shrink = (self.maximum - maximum).exp_()
        self.maximum = maximum
        logits.sub_(maximum).exp_()
        self.total.mul_(shrink).add_(logits.sum(1, keepdim=True))
        if self.with_gradients:
            steep = logits if slope is None else logits * slope
            self.sums.mul_(shrink)
            if weight.dtype == steep.dtype:
                self.sums.addmm_(steep, weight)
            else:
                self.sums.add_(steep.to(weight.dtype) @ weight)
        return shrink

    def log_total(self) -> Tensor:
        """Return log Z, (M, 1)."""
        return self.maximum + self.total.log()

    def mean(self) -> Tensor:
        """Return the expected head rows, (M, d)."""
        return self.sums / self.total


class _Statistics(NamedTuple):
    """Result of one pass over the vocabulary."""

    softmax: OnlineSoftmax
    tempered: OnlineSoftmax
    """The same of the logits over the temperature."""
    gap: Tensor | None
    """Sum over v of exp(a_v / temperature - maximum) (a_v - b_v) / temperature, (N, 1)."""


def _tiled_statistics(head: Head, x: Tensor, n: int, temperature: float | None, with_gradients: bool) -> _Statistics:
    assert head.weight is not None
    softmax = tempered = OnlineSoftmax(x, with_gradients)
    if temperature is not None and (temperature != 1 or head.logits_transform is not None):
        tempered = OnlineSoftmax(x, with_gradients)
    gap = None if temperature is None else torch.zeros_like(softmax.total[:n])
    columns = max(NARROWEST_TILE, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"]) // max(1, len(x)))
    columns = min(columns, len(head.weight))
    buffer = x.new_empty(len(x) * columns)
    for start in range(0, len(head.weight), columns):
        weight = head.weight[start : start + columns].to(x.dtype)
        raw = torch.mm(x, weight.t(), out=buffer[: len(x) * len(weight)].view(len(x), len(weight)))
        if head.bias is not None:
            raw += head.bias[start : start + columns]
        logits, slope = _transformed(raw, head.logits_transform)
        if gap is None or temperature is None:
            softmax.add(logits, weight, slope)
            continue
        difference = (logits[:n] - logits[n:]) / temperature
        if tempered is not softmax:
            steep = None if slope is None else slope[n:].repeat(2, 1)  # both reach s through its own logits
            powers = logits / temperature
            shrink = tempered.add(powers, weight, steep)
            softmax.add(logits, weight, slope)
        else:
            powers = logits
            shrink = softmax.add(logits, weight, slope)
        gap.mul_(shrink[:n]).add_(powers[:n].mul(difference).sum(1, keepdim=True))
    return _Statistics(softmax, tempered, gap)


def _cross_entropies(head: Head, x: Tensor, ids: Tensor, softmax: OnlineSoftmax) -> tuple[Tensor, Tensor]:
    """Cross-entropies (M, 1) of x (M, d) against ``ids``, and their gradients (M, d)."""
    assert head.weight is not None
    chosen = at_least_float32(head.weight[ids].to(x.dtype))
    raw = (x * chosen).sum(1, keepdim=True)
    if head.bias is not None:
        raw = raw + head.bias[ids].unsqueeze(1)
    logit, slope = _transformed(raw, head.logits_transform)
    entropy = softmax.log_total() - logit
    if not softmax.with_gradients:
        return entropy, entropy
    return entropy, softmax.mean() - (chosen if slope is None else chosen * slope)


def _transformed(raw: Tensor, transform: LogitsTransform | None) -> tuple[Tensor, Tensor | None]:
    """Logits of products, at least float32, and their derivative; None without a transform."""
    wide = at_least_float32(raw)
    if transform is None:
        return wide, None
    with torch.enable_grad():
        leaf = wide.detach().requires_grad_()
        logits = transform(leaf)
        slope = torch.autograd.grad(logits.sum(), leaf)[0]
    return logits.detach(), slope
