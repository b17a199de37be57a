"""Loading of a base of which each process reads only its part, for FSDP2.

The parameters of decoder and head become ``DTensor``s on a mesh of all processes, split along their first axis, before
transformers reads the checkpoint. It then reads from each file only what this process holds, and does what else belongs
to loading: other names in the checkpoint, stacked experts, tied weights, buffers.

A base in parts does not run by itself; ``gathering_blocks`` runs it. ``take_parts`` and ``give_parts`` hand the parts
to FSDP2, whose parameters are split alike:

    parts = take_parts(model)       # parameters are on the meta device
    fully_shard(block); ...         # and stay there
    give_parts(model, parts)
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.sharding import PARTS, is_part


@contextlib.contextmanager
def loading_in_parts(device: torch.device) -> Iterator[dict[str, Any]]:
    """Context in which ``from_pretrained`` reads this process's part of a model alone.

    Args:
        device: of the parts.

    Yields:
        Keywords of ``from_pretrained``.
    """
    from transformers.distributed import DistributedConfig

    def split(cls: type, model: PreTrainedModel, config: Any, mesh: Any) -> PreTrainedModel:
        split_parameters(model, device)
        return model

    # called between the building of a model on the meta device and its loading; inherited, so that it can be deleted
    cast(Any, PreTrainedModel).maybe_distribute_model = classmethod(split)
    try:
        yield {"distributed_config": DistributedConfig(), **({} if device.type == "cpu" else {"device_map": device})}
    finally:
        del cast(Any, PreTrainedModel).maybe_distribute_model


def split_parameters(model: PreTrainedModel, device: torch.device) -> None:
    """Replace the parameters of a model's decoder and head, on the meta device, by parts without a gradient.

    A classifier's own head stays whole: it is initialized at random, alike in every process.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),), mesh_dim_names=(PARTS,))
    parts: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in _split_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parts:
                parts[id(parameter)] = nn.Parameter(_part(parameter, mesh), requires_grad=False)
            setattr(module, name, parts[id(parameter)])


def _split_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield from architecture_of(model.config).decoder_of(model).modules()
    head = model.get_output_embeddings()
    if head is not None:
        yield from head.modules()


def _part(parameter: Tensor, mesh: Any) -> Tensor:
    """Return this process's part of a parameter, as FSDP2 splits it: the last processes may have less, or nothing."""
    from torch.distributed.tensor import DTensor, Shard

    chunks = parameter.detach().chunk(mesh.size())
    rank = mesh.get_local_rank()
    own = chunks[rank] if rank < len(chunks) else parameter.detach()[:0]
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride())


@contextlib.contextmanager
def placeholders(model: nn.Module) -> Iterator[None]:
    """Context in which parameters in parts have their whole shape and no numbers, for what is built beside them."""
    parts = [(module, *named) for module in model.modules() for named in _own_parts(module)]
    for module, name, part in parts:
        empty = torch.empty((), dtype=part.dtype, device=part.device).expand(part.shape)
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        for module, name, part in parts:
            setattr(module, name, part)


def _own_parts(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters(recurse=False) if is_part(parameter)]


def take_parts(model: nn.Module) -> dict[str, Tensor]:
    """Move parameters in parts to the meta device; return the parts of this process by the names of the parameters."""
    parts: dict[str, Tensor] = {}
    empty: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in _own_parts(module):
            parts[f"{prefix}.{name}".removeprefix(".")] = parameter
            if id(parameter) not in empty:
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                empty[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            setattr(module, name, empty[id(parameter)])
    return parts


def give_parts(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Put what ``take_parts`` returned into the parameters that FSDP2 has made of those on the meta device."""
    from torch.distributed.tensor import DTensor

    own = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[int, nn.Parameter] = {}
    for name, part in parts.items():
        if id(part) not in filled:
            layout, local = cast(Any, own[name]), cast(Any, part).to_local()
            assert layout.to_local().shape == local.shape, f"FSDP2 splits {name} otherwise than its loading did"
            tensor = DTensor.from_local(
                local,
                layout.device_mesh,
                layout.placements,
                run_check=False,
                shape=layout.shape,
                stride=layout.stride(),
            )
            filled[id(part)] = nn.Parameter(tensor, requires_grad=part.requires_grad)
    state = {name: filled[id(part)] for name, part in parts.items()}
    nn.Module.load_state_dict(model, state, strict=False, assign=True)
