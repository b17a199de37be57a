"""A shadow as a method of Hugging Face PEFT: ``get_peft_model``, ``PeftModel.from_pretrained``, TRL's ``peft_config=``.

    import shadowtune.peft

    model = get_peft_model(base, shadowtune.peft.ShadowtuneConfig())

Importing this module registers the method. Each adapter is a model of this package (``ShadowForCausalLM``) around the
same base, which stays as it is: no module of it is replaced, and while adapters are disabled it runs alone. So losses,
boundaries, caches and speculative decoding are those of the package.
"""

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from shadowtune.attach.architectures import architecture_of, check_unwrapped
from shadowtune.attach.sharding import device_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import ConfigError
from shadowtune.model.causal_lm import ShadowCausalLMOutput, ShadowForCausalLM
from shadowtune.model.checkpoint import check_contents
from shadowtune.model.classifier import ShadowClassifierOutput, ShadowForSequenceClassification
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.peft_shadowtune import (
    BASE_PREFIX,
    LIBRARY,
    OURS,
    PEFT_TYPE,
    PREFIX,
    adapter_settings,
    checksum_of,
    model_config,
    record_of,
    settings_of,
    shadow_tensors,
)
from shadowtune.model.loading import check_base, check_tensors, record_resized_base
from shadowtune.model.modeling import MERGE_ERROR, Mode, ShadowPreTrainedModel
from shadowtune.model.trainer_losses import call_fused

NAME = PEFT_TYPE.lower()
TASK_MODELS: dict[str, type[ShadowPreTrainedModel]] = {
    "CAUSAL_LM": ShadowForCausalLM,
    "SEQ_CLS": ShadowForSequenceClassification,
}
PLAIN_OUTPUTS: dict[type, Any] = {
    ShadowCausalLMOutput: CausalLMOutputWithPast,
    ShadowClassifierOutput: SequenceClassifierOutputWithPast,
}
"""Our outputs, and those of a base."""


def _add_peft_type() -> None:
    """Add our name to ``PeftType``, outside of which ``register_peft_method`` accepts no method."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)


if PEFT_TYPE not in PeftType.__members__:
    _add_peft_type()

_Settings: Any = dataclasses.make_dataclass(
    "_Settings",
    [
        (name, Any, dataclasses.field(default=value))
        for name, value in adapter_settings(ShadowConfig.recommended()).items()
    ],
    bases=(PeftConfig,),
)


@dataclasses.dataclass
class ShadowtuneConfig(_Settings):
    """Settings of a shadow, as PEFT's methods take them.

    The fields are those of ``ShadowConfig``. Where ``peft.ShadowConfig`` has the same setting, they go by its name:
    ``r``, ``shadow_alpha``, ``shadow_dropout``, ``auxiliary_loss_weight`` (lambda), ``update_hidden_size``,
    ``shadow_model`` (the backbone), ``shadow_num_hidden_layers``, ``shadow_hidden_size``,
    ``shadow_intermediate_size``, ``shadow_num_attention_heads``. The defaults are ``ShadowConfig.recommended()``.

    Raises:
        ConfigError: if a value is outside its range, settings contradict each other, or the task is not supported.
    """

    record: dict[str, Any] | None = None
    """Written by the library: the base and the backbone of an adapter. Leave it out."""
    library: str = LIBRARY
    """Written for people who open the file without this package."""
    sha256: str | None = None
    """Written by the library: the checksum of the saved tensors, which the first ones that are loaded must have. Leave
    it out, or set it to None to load others."""
    check_base_weights: bool = True
    """Whether a base of the right shape but with other weights is refused; not saved."""

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE)
        self.task_type: str = vars(self)["task_type"] or "CAUSAL_LM"
        if self.task_type not in TASK_MODELS:
            raise ConfigError(f"task_type {self.task_type!r}: a shadow is made for {' or '.join(TASK_MODELS)}")
        self.settings  # noqa: B018 - which checks the values

    @classmethod
    def of(cls, settings: ShadowConfig, **others: Any) -> "ShadowtuneConfig":
        """Return the config with these settings of a shadow; ``others`` are fields of ``PeftConfig``."""
        return cls(**adapter_settings(settings), **others)

    @property
    def settings(self) -> ShadowConfig:
        """The settings of the shadow; of a new one, the recipe yields to fields that contradict it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.record is not None:
            return settings_of(values)
        recipe = adapter_settings(ShadowConfig.recommended())
        changed = {name: value for name, value in values.items() if name in recipe and value != recipe[name]}
        ours = {theirs: name for name, theirs in OURS.items()}
        return ShadowConfig.recommended(**{ours.get(name, name): value for name, value in changed.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        values: dict[str, Any] = super().to_dict()
        del values["check_base_weights"]
        return values

    def recorded(self, config: ShadowModelConfig) -> "ShadowtuneConfig":
        """Return a copy that describes a model's shadow completely; a new shadow may be made of this one again."""
        described = copy.copy(self)
        described.record_model(config)
        return described

    def record_model(self, config: ShadowModelConfig) -> None:
        """Take settings and record from a model's config."""
        for name, value in adapter_settings(config.shadow_config).items():
            setattr(self, name, value)
        self.record, self.sha256 = record_of(config), None


class ShadowtuneLayer(nn.Module, BaseTunerLayer):
    """The trained modules of all adapters, by which PEFT finds them."""

    adapter_layer_names = ("adapters",)

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: the models around the base run the modules."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        """Let calls run with the active adapter or without; which parameters are trained stays as it is."""
        self._disable_adapters = not enabled


class ShadowtuneModel(BaseTuner):
    """PEFT's tuner of this method. ``PeftModel`` forwards what it has not itself, such as ``detached()``, to it."""

    prefix = f"{NAME}_"
    tuner_layer_cls = ShadowtuneLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        check_unwrapped(model)
        self.shadowtune = ShadowtuneLayer()
        self.models: dict[str, ShadowPreTrainedModel] = {}  # a plain dict: they hold the base as well
        self.unread: dict[str, str | None] = {}
        """Checksums of the tensors that will be loaded, by adapter."""
        decoder = architecture_of(cast(PreTrainedModel, model).config).decoder_of(cast(PreTrainedModel, model))
        self._guard = decoder.register_forward_pre_hook(_refuse_bare_base(weakref.ref(self)), with_kwargs=True)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Make an adapter: a new shadow, one whose weights will be loaded, or a copy of the one with the same config.

        Raises:
            ConfigError: if the base is not one for this task, or ``low_cpu_mem_usage`` is set.
            CheckpointError: if a saved adapter was trained beside another base.
        """
        config, base = cast(ShadowtuneConfig, self.peft_config[adapter_name]), cast(PreTrainedModel, model)
        on_meta = nn.Linear(1, 1).weight.is_meta  # inside of accelerate's init_empty_weights, as PEFT asks for it
        if low_cpu_mem_usage or (on_meta and base.device.type != "meta"):
            raise ConfigError("low_cpu_mem_usage is not for shadows, which start from the base's weights; leave it out")
        twins = [name for name, other in self.peft_config.items() if other is config and name in self.models]
        if twins:  # as TRL copies the trained adapter to "ref"
            source = self.models[twins[0]]
            made = type(source)(copy.deepcopy(source.config), source.base, copy.deepcopy(source.shadow))
            for name, module in made.trained_modules().items():
                module.load_state_dict(source.trained_modules()[name].state_dict())
        else:
            made = _model_of(base, config)
            self.unread[adapter_name] = config.sha256
        self.peft_config[adapter_name] = config.recorded(made.config)
        self.models[adapter_name] = made if self.training else made.eval()
        self.shadowtune.adapters[adapter_name] = nn.ModuleDict(made.trained_modules())
        first = len(self.models) == 1
        self.shadowtune.adapters[adapter_name].requires_grad_(first and not config.inference_mode)
        if first:
            self.shadowtune.set_adapter(adapter_name, inference_mode=config.inference_mode)

    @property
    def active_model(self) -> ShadowPreTrainedModel:
        """The active adapter as a model of this package, around the same base."""
        return self.models[self.active_adapters[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter beside the base, or the base alone while adapters are disabled.

        The output has the fields of the base's; terms of the joint loss are further attributes, which trainers do not
        gather as predictions.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        if self.shadowtune.disable_adapters:
            return self.model(*args, **given)
        if given.get("fused_lm_head"):
            return call_fused(self.active_model, self.model.forward, *args, **given)
        output = self.active_model(*args, **given)
        if type(output) not in PLAIN_OUTPUTS:
            return output
        kind = PLAIN_OUTPUTS[type(output)]
        names = {field.name for field in dataclasses.fields(kind)}
        plain = kind(**{name: value for name, value in output.items() if name in names})
        for name in {field.name for field in dataclasses.fields(output)} - names:
            object.__setattr__(plain, name, output.get(name))
        return plain

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active adapter, also speculatively (``ShadowForCausalLM.generate``), or the base alone."""
        if self.shadowtune.disable_adapters:
            return cast(Any, self.model).generate(*args, **kwargs)
        model = cast(ShadowForCausalLM, self.active_model)
        model.generation_config = self.model.generation_config
        return model.generate(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Context of PEFT around each call, which would drop the names otherwise."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: one shadow runs at a time; choose it with set_adapter, or serve several in one batch "
                "with shadowtune serve cloud"
            )
        yield

    def train(self, mode: bool = True) -> "ShadowtuneModel":
        """Set training mode in all parts."""
        super().train(mode)
        for model in self.models.values():
            model.train(mode)
        return self

    def set_mode(self, mode: Mode) -> "ShadowtuneModel":
        """Set what the active adapter computes: "attached", "detached" or "base"."""
        self.active_model.set_mode(mode)
        return self

    def detached(self) -> PreTrainedModel:
        """Return the active adapter's shadow as an ordinary transformers model (``ShadowForCausalLM.detached``)."""
        return cast(PreTrainedModel, cast(Any, self.active_model).detached())

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint the blocks of base and shadows (``PreTrainedModel.activation_checkpointing_enable``)."""
        for model in self.models.values():
            model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Checkpoint no blocks."""
        for model in self.models.values():
            model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Checkpoint the blocks of base and shadows; the name that TRL and PEFT use."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Checkpoint no blocks; the name that TRL and PEFT use."""
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Do nothing: nothing below the first boundary is trained, and the shadow prepares its own input."""

    def enable_adapter_layers(self) -> None:
        """Run with the active adapter."""
        self.shadowtune.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Run the base alone."""
        self.shadowtune.enable_adapters(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter and train it, unless ``inference_mode`` is set.

        Raises:
            ConfigError: for several at once.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ConfigError(f"one shadow runs at a time, not {len(names)}: {', '.join(names)}")
        self.shadowtune.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names[0]

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Train the named adapters or freeze them."""
        self.shadowtune.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, the first of the others becomes active.

        Raises:
            ConfigError: if there is no such adapter, or no other one.
        """
        if adapter_name not in self.models or len(self.models) == 1:
            raise ConfigError(
                f"cannot delete the adapter {adapter_name!r} of {', '.join(self.models)}; unload() removes the last one"
            )
        for entries in (self.models, self.peft_config, self.shadowtune.adapters):
            del entries[adapter_name]
        self.unread.pop(adapter_name, None)
        if adapter_name in self.active_adapters:
            self.set_adapter(next(iter(self.models)))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ConfigError: see ``merge_and_unload``."""
        raise ConfigError(MERGE_ERROR)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ConfigError: the correction depends on the input, so no weights equal it."""
        raise ConfigError(MERGE_ERROR)

    def unload(self) -> nn.Module:
        """Return the base, as it was."""
        self.models.clear()
        self._guard.remove()
        del self.model.peft_config
        return self.model

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # nothing of the base is replaced

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: a shadow is made in float32."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return an adapter's tensors, and let its config, which is saved next, describe it as it is now."""
        described, made = cast(ShadowtuneConfig, config), _tuner_of(model).models[adapter_name]
        record_resized_base(made.config, made.base)
        described.record_model(made.config)
        start = f"{PREFIX}adapters.{adapter_name}."
        tensors = {name: tensor for name, tensor in state_dict.items() if name.startswith(start)}
        described.sha256 = checksum_of({name.removeprefix(start): tensor for name, tensor in tensors.items()})
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        start = f"{PREFIX}adapters.{adapter_name}."
        return PREFIX + key.removeprefix(start) if key.startswith(start) else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return loaded tensors by their keys in the model; every key must match.

        Raises:
            CheckpointError: if a key or shape is wrong, or the first tensors after the config was read are not those
                that were saved with it.
        """
        tuner, source = _tuner_of(model), f"the file of the adapter {adapter_name!r}"
        ours = shadow_tensors(state_dict)
        check_tensors(tuner.models[adapter_name].trained_modules(), ours, source)
        check_contents(
            {name: tensor.cpu() for name, tensor in ours.items()}, tuner.unread.pop(adapter_name, None), source
        )
        of_base = {name: tensor for name, tensor in state_dict.items() if name.startswith(BASE_PREFIX)}
        return of_base | {f"{PREFIX}adapters.{adapter_name}.{name}": tensor for name, tensor in ours.items()}


def _refuse_bare_base(reference: Any) -> Callable[..., None]:
    """Return a hook on the base's decoder against trainers that train the base of a ``PeftModel`` without its tuner.

    Such a loss (TRL's Distillation trainer) would have no gradient for the shadow, and training would change nothing.
    """

    def refuse(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tuner = reference()
        if tuner is None or not tuner.training or not torch.is_grad_enabled() or kwargs.get("shadow") is not None:
            return
        if not tuner.models or tuner.shadowtune.disable_adapters or tuner.active_model.mode != "attached":
            return
        if tuner.active_model.get_decoder() is decoder:  # a copy of the base has the hook as well
            raise ConfigError(
                "the base was called in training without its shadow, as TRL's Distillation trainer calls the base of a "
                "PeftModel; train a ShadowForCausalLM with shadow_loss_weight=0 instead, or use another trainer"
            )

    return refuse


def _model_of(base: PreTrainedModel, config: ShadowtuneConfig) -> ShadowPreTrainedModel:
    """Return a model around a base: with a new shadow, or with one whose weights will be loaded."""
    kind = TASK_MODELS[config.task_type]
    if config.record is None:
        return kind.from_base(base, config.settings)
    saved = model_config(config.to_dict(), "the adapter")
    check_base(saved, base, config.check_base_weights)
    assert saved.backbone_config is not None
    saved.backbone_config._attn_implementation = base.config._attn_implementation
    made = kind(saved, base)
    for module in made.trained_modules().values():
        module.to(device_of(base))
    return made


def _tuner_of(model: nn.Module) -> ShadowtuneModel:
    """Return the tuner of a ``PeftModel``."""
    return cast(ShadowtuneModel, model.base_model if isinstance(model, PeftModel) else model)


def shadow_model_of(model: nn.Module) -> nn.Module:
    """Return the active adapter of a ``PeftModel`` of this method as a model of this package; others as they are."""
    if isinstance(model, PeftModel) and isinstance(model.base_model, ShadowtuneModel):
        return model.base_model.active_model
    return model


register_peft_method(name=NAME, config_cls=ShadowtuneConfig, model_cls=ShadowtuneModel, prefix=ShadowtuneModel.prefix)
