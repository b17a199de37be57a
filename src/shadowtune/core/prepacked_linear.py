"""Prepacked linear layers: matrix products of small batches on CPUs, up to three times as fast as ``x W^T``.

A decoding step of a few sequences, or a pass that verifies a draft, multiplies an x of some rows by each weight W of
the base. MKL reorders W in each product of 4 rows or more, which costs more than the product. Within the context
``prepacked_linear`` a reordered copy of W is kept, made after the layer has computed some small batches. Without a
copy, (W x^T)^T still reads W more efficiently than x W^T. Results differ by the order of summation alone.

A copy does not follow changes of its weight. The caller guarantees that the weights do not change within the context;
therefore no library call opens one by itself (``ShadowForCausalLM.generate`` never does).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 64
"""Rows up to which a product of a packed weight is faster (docs/log.md)."""
TRANSPOSED_ROWS = range(4, 49)
"""Rows for which (W x^T)^T is faster; these, not single rows, also make a copy worth its memory."""
PRODUCTS_BEFORE_PACKING = 8
"""Products of such rows that a layer computes before its weight is copied; a few tokens are not worth a copy."""
MAX_PACKED_BYTES = 2 * 2**30
"""Largest weights of all layers together that are copied."""


@contextmanager
def prepacked_linear(*modules: nn.Module) -> Iterator[None]:
    """Context in which the linear layers of modules use prepacked weights for small batches.

    This applies to float32 on a CPU with MKL and without gradients; everything else is computed as before. The context
    owns the copies of the weights and frees them at its end. Until then each of its layers has an instance attribute
    ``forward``, as hooks of accelerate set it; classes, parameters and keys do not change. A layer that has such an
    attribute already, from accelerate or from another such context, is left alone.

    Args:
        modules: their weights must not change within the context, neither in place nor through ``.data``: results with
            an old copy would be silently wrong.
    """
    layers = [layer for module in modules for layer in module.modules() if _gains(layer)]
    size = sum(weight.nbytes for weight in {layer.weight for layer in layers})
    packed_weights = PackedWeights(enabled=size <= MAX_PACKED_BYTES and packing_works())
    replaced = []
    for layer in layers:
        if "forward" not in vars(layer):  # a layer that two of the modules share was met before
            replaced.append(PrepackedForward(layer, packed_weights))
            layer.forward = replaced[-1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        for forward in replaced:
            if vars(forward.layer).get("forward") is forward:
                del forward.layer.forward
        packed_weights.close()


class PackedWeights:
    """The packed copies of one context, one per weight, however many layers share it."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._copies: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, weight: Tensor) -> Tensor | None:
        """Return the copy of a weight, if there is one already."""
        return self._copies.get(id(weight))

    def pack(self, weight: Tensor) -> Tensor:
        """Copy a weight (N, K) into MKL's order."""
        packed = self._copies[id(weight)] = _pack(weight)
        return packed

    def close(self) -> None:
        """Free all copies and make no more."""
        self.enabled = False
        self._copies.clear()


class PrepackedForward:
    """``forward`` of one linear layer within ``prepacked_linear``."""

    def __init__(self, layer: nn.Linear, packed_weights: PackedWeights) -> None:
        self.layer = layer
        self._weight, self._packed_weights, self._products = layer.weight, packed_weights, 0

    def __call__(self, input: Tensor) -> Tensor:
        """Compute (..., K) -> (..., N)."""
        weight, bias = self.layer.weight, self.layer.bias
        rows = input.numel() // input.shape[-1]
        usual = torch.is_grad_enabled() or torch.compiler.is_compiling() or weight is not self._weight
        if usual or not 0 < rows <= MAX_ROWS:
            return F.linear(input, weight, bias)
        packed = self.packed(rows)
        if packed is not None:
            product: Tensor = torch.ops.mkl._mkl_linear(input, packed, weight, bias, rows)
            return product
        if rows not in TRANSPOSED_ROWS:
            return F.linear(input, weight, bias)
        columns = input.reshape(rows, -1).t()
        transposed = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        return transposed.t().contiguous().view(*input.shape[:-1], -1)

    def packed(self, rows: int) -> Tensor | None:
        """Return the weight in MKL's order, once its layer has computed enough small batches."""
        packed = self._packed_weights.get(self._weight)
        if packed is None and self._packed_weights.enabled and rows in TRANSPOSED_ROWS:
            self._products += 1
            if self._products > PRODUCTS_BEFORE_PACKING:
                packed = self._packed_weights.pack(self._weight)
        return packed

    def __reduce__(self) -> Any:
        """Give a copy or a pickle of the layer the ordinary ``forward``: the packed weights belong to the context."""
        return partial, (nn.Linear.forward, self.layer)


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether it is an ordinary linear layer with an ordinary weight, not a quantized one."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


@cache
def packing_works() -> bool:
    """Return whether MKL multiplies packed weights here, also by other numbers of rows than they were packed for.

    All known versions do, but no documentation guarantees the latter, so it is tried once.
    """
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    for outputs, inputs in ((96, 40), (33, 130), (256, 64)):
        weight = torch.linspace(-1, 1, outputs * inputs).sin().reshape(outputs, inputs)
        packed = _pack(weight)
        for rows in (1, 7, 16, 33, MAX_ROWS):
            x = torch.linspace(-2, 2, rows * inputs).cos().reshape(rows, inputs)
            if not torch.allclose(torch.ops.mkl._mkl_linear(x, packed, weight, None, rows), x @ weight.t(), atol=1e-4):
                return False
    return True


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), MAX_ROWS)
    return packed


def _gains(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if not is_plain_linear(layer) or not layer.weight.is_contiguous():
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkl.is_available()
