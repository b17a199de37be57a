"""The bases that benchmarks run on: any causal language model, or ``tiny``, which needs no file and no time."""

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.model.methods import load_base
from shadowtune.models import resolve

TINY = "tiny"
"""Name of the base that is made on the spot, with random weights."""


def base_config(name: str) -> PreTrainedConfig:
    """Return the config of a base without loading its weights.

    Raises:
        CheckpointError: if there is no such model.
    """
    if name == TINY:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        if isinstance(error, ShadowtuneError):
            raise
        raise CheckpointError(f"cannot load the model {name}: {str(error).splitlines()[0]}") from None


def real_base(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a base, or make the tiny one; its weights are frozen."""
    if name == TINY:
        base = AutoModelForCausalLM.from_config(base_config(name), dtype=dtype)
    else:
        base = load_base(name, dtype=dtype)
    cast(nn.Module, base).to(device)
    return base.requires_grad_(False)


def shapeless_base(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a base that has shapes but no weights, to count parameters with. Call under ``torch.device("meta")``."""
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)
