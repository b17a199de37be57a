"""Trained tensors and optimizer states that several processes share: gathered whole for a checkpoint, and loaded.

FSDP2 keeps a part of each tensor in every process (``DTensor``), as ZeRO 3 of DeepSpeed does; ZeRO 1 and 2 keep whole
weights. All stages of ZeRO share the optimizer's state and a float32 copy of the weights, which Adam updates.
A checkpoint holds no parts: it has the trained tensors and the optimizer's state as one process would write them, so
that it is as small as under DDP, and a run begun in one layout continues in another one.

All functions are collective where the model is shared: every process must call them, in the same order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from shadowtune.attach.sharded_loading import give_parts, take_parts
from shadowtune.attach.sharding import is_partitioned, part_of, whole_shape, whole_tensor, write_whole
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import read_tensors, trained_tensors
from shadowtune.model.methods import adapter_names
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.training.parallelism import asks_for_deepspeed, asks_for_fsdp, fsdp_plugin

ZERO_STATES = ("exp_avg", "exp_avg_sq")
"""Moments of Adam, the only optimizer of ``ShadowTrainer``."""


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return the whole tensor, without a gradient."""
    return whole_tensor(tensor).detach().cpu()


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
    return _on_cpu(parameter if copy is None else copy)


@torch.no_grad()
def load_state(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy whole tensors into a model that processes may share; each keeps its part.

    Raises:
        CheckpointError: naming ``source``, if a name or shape does not fit the model.
    """
    own = _saved_tensors(model)
    for name, tensor in tensors.items():
        if name not in own or whole_shape(own[name]) != tensor.shape:
            raise CheckpointError(f"{source} does not fit the model: {name} of shape {tuple(tensor.shape)}")
        write_whole(own[name], tensor)


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
        optimizer: DeepSpeed's ZeRO optimizer; its own ``optimizer`` is Adam of flat partitions.
        groups: the trained parameters by group, in the order in which the optimizer was made.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[int, dict[str, Tensor]] = {}
    settings: list[dict[str, Any]] = []
    for number, (group, parameters) in enumerate(zip(optimizer.optimizer.param_groups, groups, strict=True)):
        flat = optimizer.optimizer.state.get(_partitions(optimizer, number)[0], {})
        _show_moments(optimizer, number, parameters)
        first = sum(len(each["params"]) for each in settings)
        settings.append({name: value for name, value in group.items() if name != "params"})
        settings[-1]["params"] = list(range(first, first + len(parameters)))
        for index, parameter in enumerate(parameters, start=first):
            if "step" in flat:
                moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in ZERO_STATES}
                state[index] = {"step": torch.as_tensor(flat["step"]).cpu(), **moments}
    return {"state": state, "param_groups": settings}


def _partitions(optimizer: Any, number: int) -> list[Tensor]:
    """Return this process's flat tensors of a group of parameters: one, or with ZeRO 3 one for each of its parts."""
    if not _is_zero_3(optimizer):
        return cast(list[Tensor], optimizer.optimizer.param_groups[number]["params"])
    groups = optimizer.sub_group_to_group_id
    return [flat for part, flat in enumerate(optimizer.fp32_partitioned_groups_flat) if groups[part] == number]


def _is_zero_3(optimizer: Any) -> bool:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def _show_moments(optimizer: Any, number: int, parameters: list[nn.Parameter]) -> None:
    """Let DeepSpeed's functions find the moments of parameters in those of the partitions; ZeRO 3 looks there."""
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    if not _is_zero_3(optimizer):
        (flat,) = _partitions(optimizer, number)
        if "step" in optimizer.optimizer.state.get(flat, {}):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


@torch.no_grad()
def load_zero_state(
    optimizer: Any, groups: list[list[nn.Parameter]], state: dict[str, Any], weights: Mapping[int, Tensor]
) -> None:
    """Load the state of an optimizer into DeepSpeed's partitioned Adam; arguments as ``zero_optimizer_state``.

    Args:
        state: what ``optimizer_state`` or ``zero_optimizer_state`` returned.
        weights: trained tensors in float32 by ``id`` of their parameter.
    """
    inner, index = optimizer.optimizer, 0
    for number, (saved, parameters) in enumerate(zip(state["param_groups"], groups, strict=True)):
        inner.param_groups[number].update({name: value for name, value in saved.items() if name != "params"})
        moments = [state["state"].get(index + offset) for offset in range(len(parameters))]
        for flat in _partitions(optimizer, number) if moments and moments[0] is not None else ():
            zeros = {name: torch.zeros_like(flat) for name in ZERO_STATES}
            inner.state[flat] = {"step": moments[0]["step"].clone(), **zeros}
        _show_moments(optimizer, number, parameters)
        for parameter, values in zip(parameters, moments, strict=True):
            write_master(parameter, weights[id(parameter)])
            for name in ZERO_STATES if values is not None else ():
                write_master(parameter, values[name], name)
        index += len(parameters)


def write_master(parameter: Tensor, whole: Tensor, moment: str | None = None) -> None:
    """Write DeepSpeed's float32 copy of a trained parameter, or a moment of it; each process keeps its part."""
    from deepspeed import utils

    whole = whole.to(parameter.device, torch.float32)
    if is_partitioned(parameter):  # whose own function for whole tensors fails where parts are padded
        size, rank = cast(Any, parameter).ds_tensor.numel(), torch.distributed.get_rank()
        part = F.pad(whole.flatten(), (0, size * torch.distributed.get_world_size() - whole.numel()))
        part = part[size * rank : size * (rank + 1)]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        utils.safe_set_full_fp32_param(parameter, whole)
    else:
        utils.safe_set_full_optimizer_state(parameter, whole, moment)


class ShardedTrainer(Trainer):
    """``transformers.Trainer`` whose saves and checkpoints are those of one process, in every layout.

    transformers writes the whole model with its frozen part under FSDP and DeepSpeed, in files that only the same
    layout reads. Here the model's directory and ``optimizer.pt`` are those of DDP.
    """

    _groups: list[list[nn.Parameter]] = []

    @property
    def shares_states(self) -> bool:
        """Whether processes share weights or the optimizer's state."""
        return bool(self.is_fsdp_enabled or self.args.deepspeed_plugin is not None)

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
        model = cast(nn.Module, self.model)
        parts = take_parts(model)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        give_parts(model, parts)
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
            load_zero_state(optimizer.optimizer, self._groups, state, self._checkpoint_weights(checkpoint))
        else:
            load_optimizer_state(optimizer, state)
        scheduler = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(scheduler)

    def _load_shared_weights(self, checkpoint: str) -> None:
        """Load a checkpoint's tensors into the model, before or after it is shared."""
        model = cast(nn.Module, self.model)
        load_state(model, checkpoint_tensors(model, checkpoint), checkpoint)
        if self.deepspeed is not None:  # its engine runs: later saves take its float32 copies
            weights = self._checkpoint_weights(checkpoint)
            for parameter in (each for group in self._groups for each in group):
                write_master(parameter, weights[id(parameter)])

    def _checkpoint_weights(self, checkpoint: str) -> dict[int, Tensor]:
        """Read the tensors of a checkpoint by ``id`` of their parameter."""
        model = cast(nn.Module, self.model)
        own = dict(model.named_parameters())
        return {id(own[name]): tensor for name, tensor in checkpoint_tensors(model, checkpoint).items() if name in own}


def checkpoint_tensors(model: nn.Module, checkpoint: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by their names in ``model.state_dict()``."""
    adapter = Path(checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
    if not adapter.is_file():
        return read_tensors(checkpoint, checked=isinstance(model, ShadowPreTrainedModel))
    names = adapter_names(model, _saved_tensors(model))
    return {names[name]: tensor for name, tensor in load_file(adapter).items()}
