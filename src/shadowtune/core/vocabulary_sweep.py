r"""Softmax statistics of both networks behind one frozen head, in one sweep over the vocabulary.

Cross-entropies of the attached model and of the shadow, and the divergence between them, need three things of a row x
of either: log Z = log sum_v exp(x . w_v), the logit of the target, and the expected head row  mu = sum_v p_v w_v:

    CE(x, y)     = log Z - x . w_y                                 d/dx = mu - w_y
    KL(p_h, p_s) = sum_v p_v (a_v - b_v) - log Z_h + log Z_s       d/ds = mu_s - mu_h

with a and b the logits of h and s. The head wants no gradient, so these are all that the backward pass will ask for.
The vocabulary is cut into tiles of some thousand tokens, and each sum runs over the tiles with a running maximum
(https://arxiv.org/abs/1805.02867): (N, V) logits never exist, each row of the head is read once for both networks, and
the divergence costs no product at all, since the cross-entropies have made both expected rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shadowtune.core.head import IGNORE_INDEX, Head, at_least_float32

TILE_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a tile: 32 MB of float32 stay near a processor, a GPU wants larger products."""
NARROWEST_TILE = 512
"""Tokens of a tile at least; products of fewer are slow."""


class Sweep(torch.autograd.Function):
    """(head, h, s or None, targets, temperature or None) -> sums, as ``head_sums`` describes."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, h: Tensor, s: Tensor | None, targets: Tensor, temperature: float | None
    ) -> tuple[Tensor | None, ...]:
        """Sweep once; keep the rows' gradients."""
        expect = h.requires_grad or (s is not None and s.requires_grad)
        networks, n = (1 if s is None else 2), len(targets)
        x = torch.cat([h] if s is None else [h, s.to(h.dtype)]).to(product_dtype(head))
        seen = _sweep(head, x, n, temperature, expect)
        kept = (targets != IGNORE_INDEX).unsqueeze(1)
        ids = targets.clamp(min=0).repeat(networks)
        entropy, entropy_gradient = _cross_entropies(head, x, ids, seen.softmax)
        sums: list[Tensor | None] = [*(entropy.view(networks, n, 1) * kept).sum((1, 2))]
        gradients: list[Tensor | None] = []
        if expect:
            gradients = [*(entropy_gradient.view(networks, n, x.shape[1]) * kept).to(h.dtype)]
        if seen.gap is not None and temperature is not None:
            p, log_total = seen.tempered.total[:n], seen.tempered.log_total()
            divergence = seen.gap / p - log_total[:n] + log_total[n:]
            sums.append(temperature**2 * (divergence * kept).sum())
            if expect:
                mean = seen.tempered.mean()
                gradients.append((temperature * (mean[n:] - mean[:n]) * kept).to(h.dtype))
        ctx.save_for_backward(*gradients)
        return tuple(sums + [None] * (3 - len(sums)))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradients: the first is that of h, the others are those of s."""
        scaled = [g * up.to(g.dtype) for g, up in zip(ctx.saved_tensors, outer, strict=False)]
        return None, scaled[0], sum(scaled[2:], scaled[1]) if len(scaled) > 1 else None, None, None


class OnlineSoftmax:
    """log Z and expected head rows of (M, V) logits that come a tile of columns at a time."""

    def __init__(self, rows: Tensor, expect: bool) -> None:
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.maximum = rows.new_full((len(rows), 1), float("-inf"), dtype=wide)
        self.total = rows.new_zeros(len(rows), 1, dtype=wide)
        self.sums = rows.new_zeros(rows.shape if expect else (0, 0), dtype=wide)
        self.expect = expect

    def add(self, logits: Tensor, weight: Tensor, slope: Tensor | None) -> Tensor:
        """Take in a tile.

        Args:
            logits: (M, t), written over by their exponentials less the running maximum.
            weight: (t, d), the head's rows.
            slope: (M, t), of the logits over the product x . w_v; None if it is 1.

        Returns:
            (M, 1), by what sums of earlier tiles have to be multiplied.
        """
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        shrink = (self.maximum - maximum).exp_()
        self.maximum = maximum
        logits.sub_(maximum).exp_()
        self.total.mul_(shrink).add_(logits.sum(1, keepdim=True))
        if self.expect:
            steep = logits if slope is None else logits * slope
            self.sums.mul_(shrink)
            if weight.dtype == steep.dtype:
                self.sums.addmm_(steep, weight)
            else:
                self.sums.add_(steep.to(weight.dtype) @ weight)
        return shrink

    def log_total(self) -> Tensor:
        """Log Z, (M, 1)."""
        return self.maximum + self.total.log()

    def mean(self) -> Tensor:
        """Expected head rows, (M, d)."""
        return self.sums / self.total


class _Seen(NamedTuple):
    """What a sweep leaves."""

    softmax: OnlineSoftmax
    tempered: OnlineSoftmax
    """The same of the logits over the temperature."""
    gap: Tensor | None
    """Sum over v of exp(a_v / temperature - maximum) (a_v - b_v) / temperature, (N, 1)."""


def _sweep(head: Head, x: Tensor, n: int, temperature: float | None, expect: bool) -> _Seen:
    assert head.weight is not None
    softmax = tempered = OnlineSoftmax(x, expect)
    if temperature is not None and (temperature != 1 or head.finish is not None):
        tempered = OnlineSoftmax(x, expect)
    gap = None if temperature is None else torch.zeros_like(softmax.total[:n])
    columns = max(NARROWEST_TILE, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"]) // max(1, len(x)))
    columns = min(columns, len(head.weight))
    buffer = x.new_empty(len(x) * columns)
    for start in range(0, len(head.weight), columns):
        weight = head.weight[start : start + columns].to(x.dtype)
        raw = torch.mm(x, weight.t(), out=buffer[: len(x) * len(weight)].view(len(x), len(weight)))
        if head.bias is not None:
            raw += head.bias[start : start + columns]
        logits, slope = _finished(raw, head.finish)
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
    return _Seen(softmax, tempered, gap)


def _cross_entropies(head: Head, x: Tensor, ids: Tensor, softmax: OnlineSoftmax) -> tuple[Tensor, Tensor]:
    """Cross-entropies (M, 1) of the rows x (M, d) against ``ids``, and their gradients (M, d)."""
    assert head.weight is not None
    chosen = at_least_float32(head.weight[ids].to(x.dtype))
    raw = (x * chosen).sum(1, keepdim=True)
    if head.bias is not None:
        raw = raw + head.bias[ids].unsqueeze(1)
    logit, slope = _finished(raw, head.finish)
    entropy = softmax.log_total() - logit
    if not softmax.expect:
        return entropy, entropy
    return entropy, softmax.mean() - (chosen if slope is None else chosen * slope)


def _finished(raw: Tensor, finish: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Logits of products, at least float32, and their slope; None if nothing is done to them."""
    wide = at_least_float32(raw)
    if finish is None:
        return wide, None
    with torch.enable_grad():
        leaf = wide.detach().requires_grad_()
        logits = finish(leaf)
        slope = torch.autograd.grad(logits.sum(), leaf)[0]
    return logits.detach(), slope


def product_dtype(head: Head) -> torch.dtype:
    """Return the dtype of products with the head's weight, which must be known: autocast's, or that of the weight."""
    assert head.weight is not None
    device = head.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
