"""Trained tensors and optimizer states that several processes share: gathered whole for a checkpoint, and loaded.

FSDP2 keeps a part of each tensor in every process (``DTensor``); DeepSpeed's ZeRO 1 and 2 keep whole weights, but parts
of the optimizer's state, and of a float32 copy of 16-bit weights. A checkpoint holds neither: it has the trained
tensors and the optimizer's state as one process would write them, so that it is as small as under DDP, and a run
begun in one layout continues in another one.

All functions are collective where the model is shared: every process must call them, in the same order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from shadowtune.attach.sharding import whole_tensor
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import read_tensors, trained_tensors
from shadowtune.model.methods import adapter_names
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.training.parallelism import asks_for_deepspeed, asks_for_fsdp, fsdp_plugin

ZERO_STATES = ("exp_avg", "exp_avg_sq")
"""Moments of Adam, the only optimizer of ``ShadowTrainer``."""


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return the whole tensor, without a gradient."""
    return whole_tensor(tensor.detach()).cpu()


@torch.no_grad()
def trained_state(model: nn.Module, precise: bool = False) -> dict[str, Tensor]:
    """Gather the tensors of a model that a save holds, by their names in ``model.state_dict()``.

    Args:
        model: a shadow model, of which its trained modules are saved; a ``PeftModel`` or another model, of which
            trainable parameters and buffers are.
        precise: whether DeepSpeed trains it, whose float32 copy of a trained weight is taken.
    """
    tensors = _saved_tensors(model)
    gathered: dict[int, Tensor] = {}  # tied parameters stay one tensor
    for tensor in tensors.values():
        if id(tensor) not in gathered:
            gathered[id(tensor)] = _master(tensor) if precise and tensor.requires_grad else _on_cpu(tensor)
    return {name: gathered[id(tensor)] for name, tensor in tensors.items()}


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, ShadowPreTrainedModel):
        saved = trained_tensors(model.trained_modules())
        every: dict[str, Tensor] = model.state_dict(keep_vars=True)  # whose hook shares what a forward gathered
        return {name: every[name] for name in saved}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


def _master(parameter: Tensor) -> Tensor:
    """Return DeepSpeed's float32 copy of a parameter, or the parameter where it keeps none."""
    from deepspeed.utils import safe_get_full_fp32_param

    copy: Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter.detach() if copy is None else copy.detach().cpu()


@torch.no_grad()
def load_state(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy whole tensors into a model that FSDP2 may share; each process keeps its part.

    Raises:
        CheckpointError: naming ``source``, if a name or shape does not fit the model.
    """
    own = _saved_tensors(model)
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise CheckpointError(f"{source} does not fit the model: {name} of shape {tuple(tensor.shape)}")
        own[name].copy_(part_of(tensor.to(own[name].device, own[name].dtype), own[name]))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, laid out as ``like`` is; every process has it, so nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Gather the state of an optimizer of DTensors or of ordinary tensors, as ``state_dict`` of one process."""
    state = optimizer.state_dict()
    moments = {
        index: {name: _on_cpu(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` returned, in this layout or another one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: part_of(value, parameters[index]) if _is_moment(value, parameters[index]) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def zero_optimizer_state(optimizer: Any, groups: list[list[nn.Parameter]]) -> dict[str, Any]:
    """Gather the state of DeepSpeed's partitioned Adam, in the form of ``optimizer_state``.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer; its own ``optimizer`` is Adam of one flat partition per group.
        groups: the trained parameters by group, in the order in which the optimizer was made.
    """
    from deepspeed.utils import safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    inner: Any = optimizer.optimizer
    state: dict[int, dict[str, Tensor]] = {}
    settings: list[dict[str, Any]] = []
    for group, parameters in zip(inner.param_groups, groups, strict=True):
        partition = group["params"][0]
        flat = inner.state.get(partition, {})
        if "step" in flat:
            lazy_init_hp_params_optimizer_state(parameters, partition, inner.state)
        first = sum(len(each["params"]) for each in settings)
        settings.append({name: value for name, value in group.items() if name != "params"})
        settings[-1]["params"] = list(range(first, first + len(parameters)))
        for index, parameter in enumerate(parameters, start=first):
            if "step" in flat:
                moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in ZERO_STATES}
                state[index] = {"step": torch.as_tensor(flat["step"]).cpu(), **moments}
    return {"state": state, "param_groups": settings}


@torch.no_grad()
def load_zero_state(
    optimizer: Any, groups: list[list[nn.Parameter]], state: dict[str, Any], weights: Mapping[int, Tensor]
) -> None:
    """Load the state of an optimizer into DeepSpeed's partitioned Adam; arguments as ``zero_optimizer_state``.

    Args:
        state: what ``optimizer_state`` or ``zero_optimizer_state`` returned.
        weights: trained tensors in float32 by ``id`` of their parameter.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    inner, index = optimizer.optimizer, 0
    for group, saved, parameters in zip(inner.param_groups, state["param_groups"], groups, strict=True):
        flat = group["params"][0]
        group.update({name: value for name, value in saved.items() if name != "params"})
        moments = [state["state"].get(index + offset) for offset in range(len(parameters))]
        if moments and moments[0] is not None:
            zeros = {name: torch.zeros_like(flat) for name in ZERO_STATES}
            inner.state[flat] = {"step": moments[0]["step"].clone(), **zeros}
            lazy_init_hp_params_optimizer_state(parameters, flat, inner.state)
        for parameter, values in zip(parameters, moments, strict=True):
            safe_set_full_fp32_param(parameter, weights[id(parameter)].to(parameter.device, torch.float32))
            for name in ZERO_STATES if values is not None else ():
                safe_set_full_optimizer_state(parameter, values[name].to(parameter.device, torch.float32), name)
        index += len(parameters)


class ShardedTrainer(Trainer):
    """``transformers.Trainer`` whose saves and checkpoints are those of one process, in every layout.

    transformers writes the whole model with its frozen part under FSDP and DeepSpeed, in files that only the same
    layout reads. Here the model's directory and ``optimizer.pt`` are those of DDP.
    """

    _groups: list[list[nn.Parameter]] = []

    @property
    def shares_states(self) -> bool:
        """Whether processes share weights or the optimizer's state; ZeRO 3 aside, which has files of its own."""
        plugin = self.args.deepspeed_plugin
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage < 3))

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        if arguments.get("fsdp_plugin") is None:
            arguments["fsdp_plugin"] = fsdp_plugin(cast(nn.Module, self.model), self.args.bf16)
        self._fsdp_plugin = arguments["fsdp_plugin"]
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; on CPUs, where accelerate knows DDP alone and says nothing, apply FSDP2 as well.

        Raises:
            ConfigError: if the layout that the launcher asks for is not the one that the processes have.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self._fsdp_plugin is not None and state.distributed_type is DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = self._fsdp_plugin
            self.is_fsdp_enabled = True
        dropped = (asks_for_fsdp() and not self.is_fsdp_enabled, asks_for_deepspeed() and not self.is_deepspeed_enabled)
        if any(dropped):
            raise ConfigError(
                f"the launcher asks for another layout than {state.distributed_type.value}, in which accelerate has "
                "started the processes; start more than one process, with torchrun --nproc-per-node N, or leave its "
                "FSDP and DeepSpeed settings out"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors, gathered, as one process would."""
        if not self.shares_states:
            super().save_model(output_dir, _internal_call)
            return
        state = trained_state(cast(nn.Module, self.model), precise=self.is_deepspeed_enabled)
        self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shares_states:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        if self.is_deepspeed_enabled:
            state = zero_optimizer_state(optimizer.optimizer, self._groups)
        else:
            state = optimizer_state(optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.shares_states:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:  # its weights were loaded before they were shared
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.shares_states:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            model = cast(nn.Module, self.model)
            own, saved = dict(model.named_parameters()), checkpoint_tensors(model, checkpoint)
            weights = {id(own[name]): tensor for name, tensor in saved.items() if name in own}
            load_zero_state(optimizer.optimizer, self._groups, state, weights)
        else:
            load_optimizer_state(optimizer, state)
        scheduler = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(scheduler)

    def _load_shared_weights(self, checkpoint: str) -> None:
        """Load a checkpoint's tensors into the model, before or after it is shared."""
        model = cast(nn.Module, self.model)
        load_state(model, checkpoint_tensors(model, checkpoint), checkpoint)


def checkpoint_tensors(model: nn.Module, checkpoint: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by their names in ``model.state_dict()``."""
    adapter = Path(checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
    if not adapter.is_file():
        return read_tensors(checkpoint, checked=isinstance(model, ShadowPreTrainedModel))
    names = adapter_names(model, _saved_tensors(model))
    return {names[name]: tensor for name, tensor in load_file(adapter).items()}
