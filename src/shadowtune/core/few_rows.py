"""Matrix products of few rows on processors: as W x^T, where x W^T takes up to twice as long.

What verifies a draft, or decodes some streams at once, multiplies 4 to 64 rows by each weight of the base. MKL plans
x W^T by its few rows and reads W badly; asked for (W x^T)^T it plans by the many rows of W. The sums are the same but
for the order in which they are added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST, MOST = 4, 64
"""Rows from which and up to which it is faster (docs/log.md)."""


@contextmanager
def few_rows(*modules: nn.Module) -> Iterator[None]:
    """Within this context the linear layers of the modules multiply few rows the fast way, where there is one.

    That is float32 on a processor with MKL and without gradients; all else is computed as before, and afterwards the
    layers are what they were.
    """
    layers = [layer for module in modules for layer in module.modules() if _gains(layer)]
    for layer in layers:
        layer.__class__ = FewRowsLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class FewRowsLinear(nn.Linear):
    """A linear layer that looks at how many rows it gets."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute (..., K) -> (..., N)."""
        rows = input.numel() // input.shape[-1]
        if not LEAST <= rows <= MOST or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        columns = input.reshape(rows, -1).t()
        if self.bias is None:
            product = torch.mm(self.weight, columns)
        else:
            product = torch.addmm(self.bias.unsqueeze(1), self.weight, columns)
        return product.t().contiguous().view(*input.shape[:-1], -1)


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an ordinary linear layer with an ordinary weight, not a quantized one; within ``few_rows`` too."""
    return type(layer) in (nn.Linear, FewRowsLinear) and type(layer.weight) is nn.Parameter


def _gains(layer: nn.Module) -> bool:
    if not is_plain_linear(layer) or type(layer) is FewRowsLinear:  # within another context already
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkl.is_available()
