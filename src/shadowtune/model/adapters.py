"""Adapters of Hugging Face PEFT: lora and dora by our own settings, and every other method by PEFT's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shadowtune.config.checking import nearest
from shadowtune.config.training import LoraConfig
from shadowtune.errors import ConfigError, ShadowtuneError

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


def lora_settings(lora: LoraConfig, dora: bool) -> dict[str, Any]:
    """Put our settings of lora and dora into PEFT's words."""
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "use_dora": dora,
    }


def add_adapters(base: PreTrainedModel, settings: Mapping[str, Any], task: str, dtype: torch.dtype) -> nn.Module:
    """Return ``base`` with new, trainable adapters.

    Args:
        base: a model of transformers, which PEFT freezes and changes in place.
        settings: ``peft_type`` and the fields of PEFT's config of that type.
        task: a key of ``TASK_TYPES``.
        dtype: of the trained parameters.

    Raises:
        ConfigError: if PEFT has no such type or setting, or the type is not supported here.
        ShadowtuneError: if PEFT is not installed.
    """
    model = import_peft().get_peft_model(base, _peft_config(settings, task))
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT chooses float32 or the base's dtype
            parameter.data = parameter.data.to(dtype)
    return model


def open_adapters(base: PreTrainedModel, directory: str | Path) -> nn.Module:
    """Load saved adapters beside their base; what PEFT raises is not caught here."""
    return import_peft().PeftModel.from_pretrained(base, str(directory))


def import_peft() -> Any:
    """Return the package; raises ShadowtuneError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ShadowtuneError(
            "methods lora, dora and peft need Hugging Face PEFT: pip install 'shadowtune[peft]'"
        ) from None
    return peft


def _peft_config(settings: Mapping[str, Any], task: str) -> Any:
    kinds = {kind.value: config for kind, config in import_peft().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name, values = settings.get("peft_type"), {key: value for key, value in settings.items() if key != "peft_type"}
    if name not in kinds:
        raise ConfigError(f"peft.peft_type {name!r} is unknown to PEFT{nearest(name, kinds)}")
    known = [field.name for field in dataclasses.fields(kinds[name])]
    faults = [f"peft.{key}{nearest(key, known)}" for key in values if key not in known]
    if faults:
        raise ConfigError(f"PEFT's {name} has no setting {', '.join(faults)}")
    try:
        config = kinds[name](**{"task_type": TASK_TYPES[task], **values})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft: {name} refuses its settings: {' '.join(str(error).split())}") from None
    if config.is_prompt_learning:
        raise ConfigError(f"peft.peft_type {name} puts tokens before the prompt, which training here cannot label")
    return config
