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
import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.sharding import (
    PARTS,
    device_of,
    is_fsdp_managed,
    is_part,
    is_sharded_by_fsdp,
    whole_tensor,
)
from shadowtune.errors import AttachError


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
    mesh = _mesh(device)
    parts: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in _split_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parts:
                parts[id(parameter)] = nn.Parameter(_part(parameter, mesh), requires_grad=False)
            setattr(module, name, parts[id(parameter)])


def _mesh(device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),), mesh_dim_names=(PARTS,))


def _split_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield from architecture_of(model.config).decoder_of(model).modules()
    head = model.get_output_embeddings()
    if head is not None:
        yield from head.modules()


def _part(parameter: Tensor, mesh: Any) -> Tensor:
    """Return this process's part of a parameter, as FSDP2 splits it: the last processes may have less, or nothing."""
    chunks, rank = parameter.detach().chunk(mesh.size()), mesh.get_local_rank()
    return _joined(chunks[rank] if rank < len(chunks) else parameter.detach()[:0], parameter, mesh)


def _joined(local: Tensor, whole: Tensor, mesh: Any) -> Tensor:
    """Return the ``DTensor`` of this process's part, with shape and stride of ``whole``."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def as_parts(base: PreTrainedModel) -> PreTrainedModel:
    """Return a base that transformers sharded by FSDP at loading (``DistributedConfig(fsdp_size=n)``) as one in parts.

    transformers calls the whole base, and a shadow its decoder and its head. So the result is another model, without
    FSDP, which shares the memory of the parts. A base that is not sharded by FSDP is returned as it is.

    Raises:
        AttachError: if the base is shared in another way as well, or loaded in the first process alone.
    """
    if is_fsdp_enabled():
        raise AttachError(
            "fsdp_cpu_ram_efficient_loading loads the base in the first process alone, but every process starts its "
            "shadow from it; set it to false and load with DistributedConfig(fsdp_size=n), or use shadowtune train"
        )
    if not is_fsdp_managed(base):
        return base
    layout: Any = base.config.distributed_config
    if layout.fsdp_size != torch.distributed.get_world_size() or layout.fsdp_cpu_offload or layout.fsdp_mixed_precision:
        raise AttachError(
            "beside a shadow, a base is sharded by DistributedConfig(fsdp_size=n) alone, with all n processes; leave "
            "the other settings out (bfloat16 is bf16=True of the training arguments)"
        )
    for module in base.modules():
        if is_sharded_by_fsdp(module):
            cast(Any, module).reshard()
    config = copy.deepcopy(base.config)
    del config.distributed_config
    with torch.device("meta"):
        plain = cast(PreTrainedModel, type(base).__bases__[1](config))  # after FSDPModule
    mesh, split = _mesh(device_of(base)), {id(p) for module in _split_modules(base) for p in module.parameters()}
    taken: dict[int, nn.Parameter] = {}
    for path, module in base.named_modules():
        target = plain.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in taken:
                tensor = _moved(parameter, mesh) if id(parameter) in split else whole_tensor(parameter)
                taken[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(target, name, taken[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(target, name, buffer)
    plain.generation_config = base.generation_config
    plain.train(base.training)
    return plain


def _moved(parameter: Tensor, mesh: Any) -> Tensor:
    """Return a ``DTensor`` with the local part of another one, on another mesh of the same processes."""
    return _joined(cast(Any, parameter.detach()).to_local(), parameter, mesh)


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
    own = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[int, nn.Parameter] = {}
    for name, part in parts.items():
        if id(part) not in filled:
            layout = cast(Any, own[name])
            assert layout.to_local().shape == cast(Any, part).to_local().shape, f"FSDP2 splits {name} in another way"
            filled[id(part)] = nn.Parameter(_moved(part, layout.device_mesh), requires_grad=part.requires_grad)
    state = {name: filled[id(part)] for name, part in parts.items()}
    nn.Module.load_state_dict(model, state, strict=False, assign=True)
