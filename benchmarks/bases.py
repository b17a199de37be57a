"""Base models of the benchmarks: any causal language model, or a random one of a given shape, which needs no file.

``NAME:4`` is the base NAME cut to its first 4 blocks, to see how costs grow with the depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Tokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shadowtune.config.shapes import shapes
from shadowtune.errors import ConfigError
from shadowtune.export.exporting import read_tokenizer
from shadowtune.model.methods import load_base, load_base_config
from shadowtune.models import resolve

TINY = "tiny"
"""Name of the smallest random base."""


def _tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def _of_shape(values: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**values)


RANDOM: dict[str, Callable[[], PreTrainedConfig]] = {
    TINY: _tiny,
    **{f"{name}-random": partial(_of_shape, values) for name, values in shapes().items()},
}
"""Bases with random weights, for measurements of speed and memory alone: ``tiny``, and well-known shapes."""

MODEL_HELP = (
    "the base: smollm2-135m, tiny, a directory or a Hub id; NAME-random is a well-known shape with random weights, as "
    "qwen3-8b-random; NAME:4 keeps its first 4 blocks"
)


def base_config(name: str) -> PreTrainedConfig:
    """Return the config of a base without loading its weights.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: if it has fewer blocks than it is to be cut to.
    """
    whole, blocks = _split(name)
    config = RANDOM[whole]() if whole in RANDOM else load_base_config(whole)
    return config if blocks is None else _cut(config, whole, blocks)


def load_benchmark_base(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a base, or make one with random weights, directly on the device; its weights are frozen."""
    whole, blocks = _split(name)
    if whole in RANDOM:
        with device:
            base = AutoModelForCausalLM.from_config(base_config(name), dtype=dtype)
    else:
        cut: dict[str, Any] = {} if blocks is None else {"config": base_config(name)}
        base = load_base(whole, dtype=dtype, **cut)
        cast(nn.Module, base).to(device)
    return base.requires_grad_(False)


def base_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; a random base has a tokenizer of single bytes.

    Raises:
        CheckpointError: if it has none.
    """
    whole, _ = _split(name)
    if whole not in RANDOM:
        return read_tokenizer(resolve(whole))
    space = bytes_to_unicode()[ord(" ")]
    pieces = [*bytes_to_unicode().values(), 2 * space]  # llama.cpp reads no tokenizer without a merge
    merges: Any = [(space, space)]
    return GPT2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)


def check_length(config: PreTrainedConfig, length: int, model: str) -> None:
    """Raise ConfigError if a sequence of ``length`` tokens exceeds the positions of the base."""
    text, name = config.get_text_config(decoder=True), "max_position_embeddings"
    positions = vars(text).get(text.attribute_map.get(name, name))
    if positions is not None and length > positions:
        raise ConfigError(f"length {length} exceeds the {positions} positions of {model}")


def _split(name: str) -> tuple[str, int | None]:
    whole, _, blocks = name.rpartition(":")
    return (whole, int(blocks)) if whole and blocks.isdecimal() else (name, None)


def _cut(config: PreTrainedConfig, name: str, blocks: int) -> PreTrainedConfig:
    text = config.get_text_config(decoder=True)
    if not 2 <= blocks <= text.num_hidden_layers:
        raise ConfigError(f"{name} has {text.num_hidden_layers} blocks; it cannot be cut to {blocks} (2 or more)")
    kinds = vars(text).get("layer_types")
    text.num_hidden_layers = blocks
    if kinds is not None:
        text.layer_types = kinds[:blocks]
    return config
