"""A head whose weight FSDP2 shards, gathered where the weight is read outside of the head's own forward.

FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps a part of each parameter in every process and gathers the whole
ones for the forward call of the module that it was applied to. The fused loss reads the head's weight without such a
call, so it is gathered here, for as long as the loss is computed; without it, all logits would have to exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shadowtune.core.prepacked_linear import is_plain_linear


def is_sharded_linear(module: nn.Module) -> bool:
    """Return whether it is an ordinary linear layer to which FSDP2 itself was applied."""
    return isinstance(module, FSDPModule) and type(module).__bases__ == (FSDPModule, nn.Linear)


def has_whole_weight(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether it is an ordinary linear layer whose whole weight is in this process."""
    if is_sharded_linear(module):
        return not isinstance(module.weight, DTensor)
    return is_plain_linear(module)


@contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Context in which parts of a model may be called by themselves, though FSDP2 was applied to it.

    Blocks are gathered by their own calls, but what lies between them only by a call of the whole model. Every process
    must enter it; it does nothing to other models.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def gathered(module: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Context in which a linear layer that FSDP2 shards has its whole weight.

    Every process must enter it, because gathering is a collective operation.

    Args:
        module: a layer for which ``is_sharded_linear`` holds.
        inputs: (..., d_in), inputs of the layer, whose values are not used.
    """
    assert isinstance(module, FSDPModule)
    with torch.no_grad():  # a layer tied to the embedding shares its group, whose forward ends when both have run
        module(inputs.detach().reshape(-1, inputs.shape[-1])[:0])
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
