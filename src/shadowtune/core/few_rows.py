"""Matrix products of few rows on processors, for which ``x W^T`` takes up to three times as long as it need.

What decodes, some streams at once or not, or verifies a draft, multiplies few rows by each weight of the base. MKL
brings W into another order for each product of 4 rows or more, which costs more than the product. It is told to keep W
in that order: a second copy of the weights, made once they have met few rows some times. Where there is no copy,
(W x^T)^T still reads W better than x W^T does. The sums are the same but for the order in which they are added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

MOST = 64
"""Rows up to which a product of a packed weight is faster (docs/log.md)."""
TURNED = range(4, 49)
"""Rows for which (W x^T)^T is; these are also what makes a copy worth its memory, not single rows."""
BEFORE_PACKING = 8
"""Products of such rows that a layer computes before its weight is copied: a few tokens are not worth a copy."""
PACKED_BYTES = 2 * 2**30
"""Largest weights of all layers together that are copied."""
SAMPLE = 997
"""Every how many numbers a weight is looked at, to see whether it is still what was copied."""


@contextmanager
def few_rows(*modules: nn.Module) -> Iterator[None]:
    """Within this context the linear layers of the modules multiply few rows the fast way, where there is one.

    That is float32 on a processor with MKL and without gradients; all else is computed as before, and afterwards the
    layers are what they were. The copies of the weights live as long as the weights.
    """
    layers = [layer for module in modules for layer in module.modules() if _gains(layer)]
    pack = sum(weight.nbytes for weight in {layer.weight for layer in layers}) <= PACKED_BYTES and packing_works()
    for layer in layers:
        layer.products = _Products(layer.weight, pack)  # type: ignore[assignment]
        layer.__class__ = FewRowsLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            vars(layer).pop("products", None)


class FewRowsLinear(nn.Linear):
    """A linear layer that looks at how many rows it gets."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., K) -> (..., N)."""
        rows = input.numel() // input.shape[-1]
        products: _Products | None = vars(self).get("products")  # gone if another thread has just left the context
        if products is None or not 0 < rows <= MOST or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        packed = products.packed(rows)
        if packed is not None:
            product: Tensor = torch.ops.mkl._mkl_linear(input, packed, self.weight, self.bias, rows)
            return product
        if rows not in TURNED:
            return F.linear(input, self.weight, self.bias)
        columns = input.reshape(rows, -1).t()
        if self.bias is None:
            turned = torch.mm(self.weight, columns)
        else:
            turned = torch.addmm(self.bias.unsqueeze(1), self.weight, columns)
        return turned.t().contiguous().view(*input.shape[:-1], -1)


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an ordinary linear layer with an ordinary weight, not a quantized one; within ``few_rows`` too."""
    return type(layer) in (nn.Linear, FewRowsLinear) and type(layer.weight) is nn.Parameter


@cache
def packing_works() -> bool:
    """Whether MKL multiplies packed weights here, by other numbers of rows than they were packed for too.

    It does in all versions seen, but no documentation promises the latter: so it is tried once.
    """
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    for outputs, inputs in ((96, 40), (33, 130), (256, 64)):
        weight = torch.linspace(-1, 1, outputs * inputs).sin().reshape(outputs, inputs)
        packed = _pack(weight)
        for rows in (1, 7, 16, 33, MOST):
            x = torch.linspace(-2, 2, rows * inputs).cos().reshape(rows, inputs)
            if not torch.allclose(torch.ops.mkl._mkl_linear(x, packed, weight, None, rows), x @ weight.t(), atol=1e-4):
                return False
    return True


class _Copy(NamedTuple):
    packed: Tensor
    version: int
    sample: Tensor


_COPIES = WeakTensorKeyDictionary()
"""Weight -> ``_Copy``. Not kept on the layers: MKL's order must not be copied or saved along with a model."""


class _Products:
    """The products of one layer within one context."""

    def __init__(self, weight: Tensor, pack: bool) -> None:
        self._weight, self._pack, self._seen = weight, pack, 0
        copy: _Copy | None = _COPIES.get(weight)
        if copy is not None and not (copy.version == weight._version and torch.equal(copy.sample, _sample(weight))):
            _COPIES.pop(weight, None)  # it has learned or was merged into
            copy = None
        self._packed = None if copy is None else copy.packed

    def packed(self, rows: int) -> Tensor | None:
        """Return the weight in MKL's order, if it is worth it by now."""
        if self._packed is None and self._pack and rows in TURNED:
            self._seen += 1
            if self._seen > BEFORE_PACKING:
                copy = _COPIES.get(self._weight)  # by another layer with the same weight
                if copy is None:
                    copy = _COPIES[self._weight] = _Copy(
                        _pack(self._weight), self._weight._version, _sample(self._weight)
                    )
                self._packed = copy.packed
        return self._packed


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), MOST)
    return packed


def _sample(weight: Tensor) -> Tensor:
    return weight.detach().view(-1)[::SAMPLE].clone()


def _gains(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if not is_plain_linear(layer) or type(layer) is FewRowsLinear:  # within another context already
        return False
    weight = layer.weight
    if not weight.is_contiguous() or weight.is_inference():  # what it is now could not be compared with its copy
        return False
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkl.is_available()
