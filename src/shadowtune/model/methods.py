"""Training methods behind one interface: shadow, lora, dora, full, and any other method of Hugging Face PEFT.

A base is loaded, quantized if asked for (``quantization``); ``make_trainable`` adds what a method trains;
``load_trained`` reads what training saved.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from shadowtune.attach.architectures import check_unwrapped
from shadowtune.attach.sharded_loading import loading_in_parts, placeholders
from shadowtune.compatibility import keep_commit
from shadowtune.config.settings import nearest
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import LoraConfig
from shadowtune.errors import CheckpointError, ConfigError, ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.classifier import ShadowForSequenceClassification
from shadowtune.model.ensemble import SMALL, LogitEnsemble, read_weight
from shadowtune.model.files import reading, recover_directory
from shadowtune.model.objective import (
    Objective,
    causal_objective,
    class_objective,
    joint_causal_objective,
    joint_class_objective,
    own_causal_objective,
    own_class_objective,
)
from shadowtune.model.quantization import keep_differentiable
from shadowtune.models import resolve

Method = Literal["shadow", "lora", "dora", "full", "peft", "ensemble"]
Task = Literal["causal_lm", "classification"]

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
SHADOW_CLASSES: dict[str, Any] = {"causal_lm": ShadowForCausalLM, "classification": ShadowForSequenceClassification}
PEFT_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
OWN_LOSS_TYPES = ("SHADOW", "ADALORA")
"""Types of PEFT that add terms to the loss in their own forward pass. All others minimize the plain cross-entropy,
whose head runs at labelled positions alone: in time and memory they are measured as "lora" is."""


def load_base_config(name: str) -> PreTrainedConfig:
    """Return the config of a base, named as for ``load_base``; raises CheckpointError if there is no such model."""
    with reading(f"cannot load the model {name}"):
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)


def load_base(name: str, task: Task = "causal_lm", **kwargs: Any) -> PreTrainedModel:
    """Load a pretrained base by directory, Hub id or short name (``shadowtune.models``), or raise CheckpointError."""
    with reading(f"cannot load the model {name}"):
        base: PreTrainedModel = AUTO_CLASSES[task].from_pretrained(resolve(name), trust_remote_code=False, **kwargs)
    base.config.name_or_path = name
    keep_commit(base, kwargs.get("revision"))
    return base


def load_base_in_parts(name: str, task: Task, device: torch.device, **kwargs: Any) -> PreTrainedModel:
    """Load a base of which each process reads only its part, for FSDP2; arguments as of ``load_base``.

    Args:
        device: of the parts.
        **kwargs: of ``from_pretrained``; no quantization.
    """
    with loading_in_parts(device) as distributed:
        base = load_base(name, task, **distributed, **kwargs)
    del base.config.distributed_config  # which says nothing: transformers has not distributed the model
    return base


def get_shadow_model(
    base: PreTrainedModel, config: Any = None, dtype: torch.dtype = torch.float32
) -> ShadowForCausalLM | ShadowForSequenceClassification:
    """Give a base a new shadow, as ``peft.get_peft_model`` gives it an adapter.

    Args:
        base: a causal language model or a sequence classifier; it is frozen, and otherwise unchanged.
        config: a ``ShadowConfig``, by default ``ShadowConfig.recommended()``; or a ``peft.ShadowConfig``.
        dtype: of the shadow's parameters.

    Raises:
        UnsupportedArchitectureError: if the base's architecture is not in the table.
        ConfigError: if the config does not fit the base, or describes something else than a shadow.
    """
    if config is None:
        config = ShadowConfig.recommended()
    elif not isinstance(config, ShadowConfig):
        config = ShadowConfig.from_peft(config)
    check_unwrapped(base)
    classifies = base.get_output_embeddings() is None
    kind = ShadowForSequenceClassification if classifies else ShadowForCausalLM
    return cast(Any, kind).from_base(base, config, dtype=dtype)


def make_trainable(
    base: PreTrainedModel,
    method: Method,
    task: Task = "causal_lm",
    shadow: ShadowConfig | None = None,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    peft: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the model to train: ``base``, changed in place, with a new adapter; or itself for "full".

    Args:
        shadow: settings of "shadow".
        lora: settings of "lora" and "dora".
        dtype: of the trained parameters.
        peft: settings of "peft": ``peft_type``, and the fields of PEFT's config of that type.

    Raises:
        ConfigError: if PEFT has no such type or setting, or the type is not supported here.
        ShadowtuneError: if the method needs Hugging Face PEFT and it is not installed.
    """
    if method == "shadow":
        return SHADOW_CLASSES[task].from_base(base, shadow, dtype=dtype)
    if method == "ensemble":
        raise ConfigError(
            "an ensemble is two trained models (shadowtune.training.interpolation), not an adapter of one base"
        )
    if method == "full":
        return cast(nn.Module, base).to(dtype).requires_grad_(True)
    keep_differentiable(base)
    settings = (peft or {}) if method == "peft" else _lora_settings(lora or LoraConfig(), dora=method == "dora")
    return _add_adapters(base, settings, task, dtype)


def _lora_settings(lora: LoraConfig, dora: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "use_dora": dora,
    }


def _add_adapters(base: PreTrainedModel, settings: Mapping[str, Any], task: str, dtype: torch.dtype) -> nn.Module:
    with placeholders(base):
        model = import_peft().get_peft_model(base, _peft_config(settings, task))
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT chooses float32 or the base's dtype
            parameter.data = parameter.data.to(dtype)
    return model


def import_peft() -> Any:
    """Return the package ``peft``; raises ShadowtuneError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ShadowtuneError(
            "methods lora, dora and peft need Hugging Face PEFT: pip install 'shadowtune[peft]'"
        ) from None
    return peft


def adapter_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names that a ``PeftModel`` gives tensors in its files -> their names in ``model.state_dict()``.

    Args:
        model: a ``PeftModel``.
        tensors: of its state dict, each another object.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    saved = import_peft().get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    return {name: names[id(tensor)] for name, tensor in saved.items()}


def _peft_config(settings: Mapping[str, Any], task: str) -> Any:
    kinds = {kind.value: config for kind, config in import_peft().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name, values = settings.get("peft_type"), {key: value for key, value in settings.items() if key != "peft_type"}
    if name not in kinds:
        raise ConfigError(f"peft.peft_type {name!r} is unknown to PEFT{nearest(name, kinds)}")
    known = [field.name for field in dataclasses.fields(kinds[name])]
    errors = [f"peft.{key}{nearest(key, known)}" for key in values if key not in known]
    if errors:
        raise ConfigError(f"PEFT's {name} has no setting {', '.join(errors)}")
    try:
        config = kinds[name](**{"task_type": PEFT_TASK_TYPES[task], **values})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft: {name} refuses its settings: {' '.join(str(error).split())}") from None
    if config.is_prompt_learning:
        raise ConfigError(f"peft.peft_type {name} puts tokens before the prompt; training here has no labels for them")
    return config


def objective_of(method: Method, task: Task, peft_type: str | None = None) -> Objective:
    """Return the loss that training with a method minimizes; ``peft_type`` is that of the method "peft"."""
    objectives = (causal_objective, class_objective)
    if method == "shadow":
        objectives = (joint_causal_objective, joint_class_objective)
    elif method == "peft" and peft_type in OWN_LOSS_TYPES:
        objectives = (own_causal_objective, own_class_objective)
    return objectives[task == "classification"]


def load_trained(
    directory: str | Path, method: Method, task: Task, base_name: str, check_base_weights: bool = True, **kwargs: Any
) -> nn.Module:
    """Load what training saved, ready to evaluate; ``kwargs`` load the base.

    Raises:
        CheckpointError: if the files are missing or damaged, or the base is another one.
    """
    recover_directory(Path(directory))
    directory = str(directory)
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} does not exist: the run has not finished training")
    if method == "shadow" or (method == "peft" and _is_peft_shadow(directory)):
        return SHADOW_CLASSES[task].from_pretrained(
            directory, base=resolve(base_name), check_base_weights=check_base_weights, **kwargs
        )
    if method == "full":
        return load_base(directory, task, **kwargs).eval()
    if method == "ensemble":
        return _load_ensemble(Path(directory), base_name, kwargs)
    if task == "classification":  # the base may have no head, or one for other classes
        with reading(f"cannot read config.json of {directory}"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kwargs |= {"config": config, "ignore_mismatched_sizes": True}
    base = load_base(base_name, task, **kwargs)
    with reading(f"cannot load the adapters in {directory}"):
        return cast(nn.Module, import_peft().PeftModel.from_pretrained(base, directory)).eval()


def _load_ensemble(directory: Path, base_name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    lora = load_trained(directory, "lora", "causal_lm", base_name, **kwargs)
    small = load_base(str(directory / SMALL), "causal_lm", dtype=kwargs.get("dtype", torch.float32))
    return LogitEnsemble(lora, small, read_weight(directory)).eval()


def _is_peft_shadow(directory: str) -> bool:
    """Return whether PEFT's Shadow tuner wrote the adapter; it is loaded as a shadow, which can be detached."""
    with reading(f"cannot read adapter_config.json of {directory}"):
        return bool(json.loads((Path(directory) / "adapter_config.json").read_text())["peft_type"] == "SHADOW")


def context_length(model: nn.Module) -> int | None:
    """Return how many positions a model has; None if its config names no limit."""
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return (part, parameters, of these trainable) for each part; together they are the model's ``parameters()``."""
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = _part_of(name, parameter.requires_grad)
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return [(part, total, trained) for part, (total, trained) in parts.items()]


def _part_of(name: str, trained: bool) -> str:
    pieces = name.split(".")
    if pieces[0] == "shadow":
        return f"shadow {pieces[1]}"
    if pieces[0] == "shadow_score" or "score" in pieces:
        return "classification heads"
    return "adapters" if trained and pieces[0] == "base_model" else "base"  # PEFT's name of what it wraps
