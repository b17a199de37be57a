"""The methods a model can be trained with, behind one interface: shadow, lora, dora, full and any other of PEFT.

A base goes in, a model with the right parameters trainable comes out; what is trained is saved, and loaded again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import LoraConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.adapters import add_adapters, lora_settings, open_adapters
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.classifier import ShadowForSequenceClassification
from shadowtune.model.ensemble import SMALL, LogitEnsemble, read_weight
from shadowtune.model.malformed import reading
from shadowtune.model.objective import (
    Objective,
    causal_objective,
    class_objective,
    joint_causal_objective,
    joint_class_objective,
    own_causal_objective,
    own_class_objective,
)
from shadowtune.model.replacement import recover_directory
from shadowtune.models import resolve

Method = Literal["shadow", "lora", "dora", "full", "peft", "ensemble"]
Task = Literal["causal_lm", "classification"]

AUTO: dict[str, Any] = {"causal_lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
PAIRS: dict[str, Any] = {"causal_lm": ShadowForCausalLM, "classification": ShadowForSequenceClassification}
OBJECTIVES: dict[str, tuple[Objective, Objective]] = {
    "shadow": (joint_causal_objective, joint_class_objective),
}
"""What training minimizes for causal language models and classifiers, where it is not the plain cross-entropy."""
OWN_TERMS = ("SHADOW", "ADALORA")
"""Types of PEFT that add terms to the loss in their own forward pass. All others minimize the plain cross-entropy,
whose head runs at labelled positions alone: in time and memory they are measured as "lora" is."""


def load_base_config(name: str) -> PreTrainedConfig:
    """Return the config of a base, named as for ``load_base``, without loading its weights.

    Raises:
        CheckpointError: if there is no such model.
    """
    with reading(f"cannot load the model {name}"):
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)


def load_base(name: str, task: Task = "causal_lm", **kwargs: Any) -> PreTrainedModel:
    """Load a pretrained base by directory, Hub id or the name of a model we know, for one of the two tasks.

    Raises:
        CheckpointError: if there is no such model or it cannot be read.
    """
    with reading(f"cannot load the model {name}"):
        base: PreTrainedModel = AUTO[task].from_pretrained(resolve(name), trust_remote_code=False, **kwargs)
    base.config.name_or_path = name
    return base


def make_trainable(
    base: PreTrainedModel,
    method: Method,
    task: Task = "causal_lm",
    shadow: ShadowConfig | None = None,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    peft: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the model to train: ``base`` with a new adapter of the given method, or itself for "full".

    Args:
        base: a pretrained model for the task, which is changed in place.
        method: one of the methods.
        task: one of the tasks.
        shadow: settings of "shadow".
        lora: settings of "lora" and "dora".
        dtype: of the trained parameters.
        peft: settings of "peft": ``peft_type``, and the fields of PEFT's config of that type.

    Raises:
        ConfigError: if PEFT has no such type or setting.
        ShadowtuneError: if the method needs Hugging Face PEFT and it is not installed.
    """
    if method == "shadow":
        return PAIRS[task].from_base(base, shadow, dtype=dtype)
    if method == "ensemble":
        raise ConfigError(
            "an ensemble is two trained models (shadowtune.training.interpolation), not an adapter of one base"
        )
    if method == "full":
        return cast(nn.Module, base).to(dtype).requires_grad_(True)
    settings = (peft or {}) if method == "peft" else lora_settings(lora or LoraConfig(), dora=method == "dora")
    return add_adapters(base, settings, task, dtype)


def objective_of(method: Method, task: Task, peft_type: str | None = None) -> Objective:
    """Return what training with a method minimizes; ``peft_type`` says which method of PEFT "peft" is."""
    if method == "peft" and peft_type in OWN_TERMS:
        return (own_causal_objective, own_class_objective)[task == "classification"]
    return OBJECTIVES.get(method, (causal_objective, class_objective))[task == "classification"]


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
        return PAIRS[task].from_pretrained(
            directory, base=resolve(base_name), check_base_weights=check_base_weights, **kwargs
        )
    if method == "full":
        return load_base(directory, task, **kwargs).eval()
    if method == "ensemble":
        return _load_ensemble(Path(directory), base_name, kwargs)
    if task == "classification":  # the base may have no head, or one for other classes
        kwargs |= {"config": _saved_config(directory), "ignore_mismatched_sizes": True}
    base = load_base(base_name, task, **kwargs)
    with reading(f"cannot load the adapters in {directory}"):
        return open_adapters(base, directory).eval()


def _load_ensemble(directory: Path, base_name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Load LoRA and the small model beside it, with the weight of the latter's logits."""
    lora = load_trained(directory, "lora", "causal_lm", base_name, **kwargs)
    small = load_base(str(directory / SMALL), "causal_lm", dtype=kwargs.get("dtype", torch.float32))
    return LogitEnsemble(lora, small, read_weight(directory)).eval()


def _is_peft_shadow(directory: str) -> bool:
    """Whether PEFT's Shadow tuner left the adapter: it is a shadow, so it is opened as one, to be detached."""
    with reading(f"cannot read adapter_config.json of {directory}"):
        return bool(json.loads((Path(directory) / "adapter_config.json").read_text())["peft_type"] == "SHADOW")


def _saved_config(directory: str) -> PreTrainedConfig:
    with reading(f"cannot read config.json of {directory}"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def context_length(model: nn.Module) -> int | None:
    """Return how many positions a model has; None if its config knows no limit."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    name = "max_position_embeddings"
    return vars(text).get(text.attribute_map.get(name, name))


def trainable_parameters(model: nn.Module) -> int:
    """Count the parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """Rows (part, parameters, of these trainable); the rows add up to the model's ``parameters()``."""
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
