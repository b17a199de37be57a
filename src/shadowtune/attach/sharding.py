"""Weights that several processes share: DTensors (tensor parallelism, FSDP2), and parameters of DeepSpeed ZeRO stage 3.

FSDP2 keeps a part of each parameter in every process, ZeRO-3 leaves an empty one in each module, and both gather the
weights of a module around its forward call. Everything that reads weights otherwise uses the functions below, which all
processes must call alike, because gathering is a collective operation.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration

from shadowtune.core.prepacked_linear import is_plain_linear
from shadowtune.errors import AttachError

LAYOUT = ("_tp_size", "_fsdp_size", "_device_mesh", "_mesh_manager", "_is_distributed_loading_by_transformers")
"""Attributes of a model that transformers has sharded at loading."""
PARTS = "parts"
"""Name of the mesh of a base that was loaded in parts (``sharded_loading``)."""


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has taken the numbers out of a parameter."""
    return "ds_id" in vars(tensor)


def shares_weights(module: nn.Module) -> bool:
    """Whether this process has only a part of some weight."""
    return any(is_partitioned(parameter) or is_dtensor(parameter) for parameter in module.parameters())


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor."""
    return cast(torch.Size, vars(tensor)["ds_shape"]) if is_partitioned(tensor) else tensor.shape


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its numbers: itself unless it is shared, else a copy without a gradient."""
    if is_partitioned(tensor):
        with _gathered([tensor]):
            return tensor.detach().clone()
    if is_dtensor(tensor):
        return cast(Tensor, cast(Any, tensor.detach()).full_tensor())
    return tensor


def in_process_group() -> bool:
    """Whether this process is one of several; the classes of their layouts are not in every build of torch."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes share (tensor parallelism, FSDP2)."""
    if not in_process_group():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor was loaded in parts, and FSDP2 has not taken it over: its module cannot run."""
    return is_dtensor(tensor) and cast(Any, tensor).device_mesh.mesh_dim_names == (PARTS,)


def loaded_in_parts(model: nn.Module) -> bool:
    """Whether a model has parameters for which ``is_part`` holds."""
    return any(map(is_part, model.parameters()))


def is_sharded_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) was applied to the module itself."""
    if not in_process_group():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_sharded_linear(module: nn.Module) -> bool:
    """Whether it is an ordinary linear layer to which FSDP2 itself was applied."""
    return is_sharded_by_fsdp(module) and type(module).__bases__[1:] == (nn.Linear,)  # after FSDPModule


def has_whole_weight(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an ordinary linear layer whose whole weight is in this process."""
    if is_sharded_linear(module):
        return not is_dtensor(cast(Tensor, module.weight))
    return is_plain_linear(module)


@torch.no_grad()
def write_whole(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one of which each process may keep only its part."""
    if is_partitioned(tensor):
        with _gathered([tensor], writer=0):
            tensor.copy_(whole)
    else:
        tensor.copy_(part_of(whole.to(tensor.device, tensor.dtype), tensor))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, as the DTensor that ``like`` is; itself if that is none."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    layout = cast(Any, like)
    return distribute_tensor(whole.to(like.device), layout.device_mesh, layout.placements, src_data_rank=None)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return ``module.state_dict()`` with all numbers of every tensor."""
    return {name: whole_tensor(tensor).detach() for name, tensor in module.state_dict(keep_vars=True).items()}


@contextlib.contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Context in which parts of a model may be called by themselves, though FSDP2 was applied to it.

    Blocks are gathered by their own calls, but what lies between them only by a call of the whole model. It does
    nothing to other models.
    """
    if not is_sharded_by_fsdp(model):
        yield
        return
    with _unsharded(model):
        yield


@contextlib.contextmanager
def gathered_linear(module: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Context in which the weight of a linear layer may be read, though FSDP2 shards it.

    The fused loss reads the head's weight without a call of the head; otherwise all logits would have to exist.

    Args:
        module: any layer; those for which ``is_sharded_linear`` does not hold stay as they are.
        inputs: (..., d_in), inputs of the layer, whose values are not used.
    """
    if not is_sharded_linear(module):
        yield
        return
    with torch.no_grad():  # a layer tied to the embedding shares its group, whose forward ends when both have run
        module(inputs.detach().reshape(-1, inputs.shape[-1])[:0])
    with _unsharded(module):
        yield


@contextlib.contextmanager
def _unsharded(module: Any) -> Iterator[None]:
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@contextlib.contextmanager
def gathering_blocks(decoder: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which a decoder runs though its weights are shared: each block gathers its weights for its call.

    For weights of ZeRO-3 outside of its engine, and for those loaded in parts before FSDP2 takes them over. It does
    nothing to other decoders. No gradient reaches the weights.
    """
    if not any(is_partitioned(parameter) or is_part(parameter) for parameter in decoder.parameters()):
        yield
        return
    handles, contexts, inside = [], contextlib.ExitStack(), set[nn.Module]()
    for block in blocks:
        inside |= set(block.modules())
        handles.append(block.register_forward_pre_hook(lambda module, args: _enter(contexts, module)))
        handles.append(block.register_forward_hook(lambda module, args, output: contexts.pop_all().close()))
    try:
        with _whole_weights([module for module in decoder.modules() if module not in inside]):
            yield
    finally:
        contexts.close()
        for handle in handles:
            handle.remove()


def _enter(contexts: contextlib.ExitStack, module: nn.Module) -> None:
    contexts.enter_context(_whole_weights(list(module.modules())))


@contextlib.contextmanager
def _whole_weights(modules: list[nn.Module]) -> Iterator[None]:
    """Context in which the parameters of modules, without those of their submodules, are whole."""
    owned = [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]
    partitioned = [parameter for _, _, parameter in owned if is_partitioned(parameter)]
    parts = [each for each in owned if is_part(each[2])]
    for module, name, parameter in parts:
        setattr(module, name, nn.Parameter(whole_tensor(parameter), requires_grad=False))
    try:
        with _gathered(partitioned) if partitioned else contextlib.nullcontext():
            yield
    finally:
        for module, name, parameter in parts:
            setattr(module, name, parameter)


def _gathered(parameters: list[Any], writer: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """Context in which parameters of ZeRO-3 are whole; what the process ``writer`` writes into them stays."""
    import deepspeed  # an optional dependency, which is there if it has partitioned a parameter

    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, writer)
    return context


def gather_during_forward(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let the engine of ZeRO-3 gather parameters around the forward and backward pass of a module that reads them.

    The engine finds a module's own parameters; these are of its submodules, whose ``forward`` it does not call.
    """
    if integration.is_deepspeed_zero3_enabled():
        import deepspeed  # an optional dependency, which is there if its stage is 3

        for parameter in parameters:
            deepspeed.zero.register_external_parameter(module, parameter)


def take_layout(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Mark a model as transformers marks the base that it sharded at loading (``distributed_config=``).

    By these marks trainers give all processes of a tensor parallel group the same batch, count its labels once, and do
    not shard the model again.
    """
    for name in LAYOUT:
        if name in vars(base):
            setattr(model, name, vars(base)[name])
    if "distributed_config" in vars(base.config):
        model.config.distributed_config = base.config.distributed_config


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device of the first weights that are in memory: those offloaded by ``device_map`` are on "meta"."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), model.device)


def is_fsdp_managed(base: PreTrainedModel) -> bool:
    """Whether transformers sharded a model by FSDP at loading."""
    return bool(vars(base).get("_is_fsdp_managed_module"))


def check_layout(base: PreTrainedModel) -> None:
    """Refuse a base that transformers sharded by FSDP at loading: the whole of it must run, a shadow runs its parts.

    Raises:
        AttachError: with the class that trains beside it.
    """
    if is_fsdp_managed(base):
        raise AttachError(
            f"the base was sharded at loading by DistributedConfig(fsdp_size={vars(base)['_fsdp_size']}), and runs "
            "only as a whole; train beside it with ShadowForCausalLM.from_base(base, ...), or load it without"
        )


@contextlib.contextmanager
def without_partitioning() -> Iterator[None]:
    """Context in which transformers builds and loads whole models under ZeRO-3 too.

    A shadow's initialization reads and writes its weights, and must draw the random numbers that one process draws. The
    engine partitions them when it starts.
    """
    reference = integration._hf_deepspeed_config_weak_ref  # transformers has functions to set it and none to read it
    config = None if reference is None else reference()
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)
