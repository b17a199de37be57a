"""The table of supported bases: where a base keeps its blocks, and what it does after its head.

To add an architecture, add a row. A row is right when ``tests/test_architectures.py`` passes with the new name in it.
The one requirement: the model hands unknown keywords down to every decoder block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.errors import UnsupportedArchitectureError


def _plain(logits: Tensor, config: Any) -> Tensor:
    return logits


def _softcapped(logits: Tensor, config: Any) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


def _scaled_down(logits: Tensor, config: Any) -> Tensor:
    return logits / config.logits_scaling


@dataclass(frozen=True)
class Architecture:
    """What one kind of base looks like from outside."""

    decoder: str
    """Path from the task model to the headless model, whose output has ``last_hidden_state``."""
    blocks: str
    """Path from the headless model to the list of decoder blocks."""
    finish_logits: Callable[[Tensor, Any], Tensor] = _plain
    """What the model does to its head's output, given its text config."""
    mirror: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Config values that keep a mirrored backbone small and made of attention blocks only."""
    position_embeddings: str | None = None
    """Path from the headless model to learned absolute positions, which a mirror starts from."""
    scales_embeddings: bool = False
    """Whether the input embedding multiplies its rows by sqrt(width)."""

    def decoder_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the headless model inside a causal LM or a sequence classifier."""
        return model.get_submodule(self.decoder)

    def blocks_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the decoder blocks of a causal LM or a sequence classifier."""
        blocks = self.decoder_of(model).get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


_LLAMA_LIKE = Architecture("model", "layers")
_ONE_EXPERT = MappingProxyType({"num_local_experts": 1, "num_experts_per_tok": 1})

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "gemma2": Architecture("model", "layers", _softcapped, scales_embeddings=True),
    "gemma3_text": Architecture("model", "layers", _softcapped, scales_embeddings=True),
    "granite": Architecture("model", "layers", _scaled_down),
    "gpt2": Architecture("transformer", "h", position_embeddings="wpe"),
    "gpt_neox": Architecture("gpt_neox", "layers"),
    "opt": Architecture("model", "decoder.layers", position_embeddings="decoder.embed_positions"),
    "mixtral": Architecture("model", "layers", mirror=_ONE_EXPERT),
    "gpt_oss": Architecture("model", "layers", mirror=_ONE_EXPERT),
    "qwen3_moe": Architecture("model", "layers", mirror=MappingProxyType({"decoder_sparse_step": 1_000_000})),
    "qwen3_next": Architecture("model", "layers", mirror=MappingProxyType({"decoder_sparse_step": 1_000_000})),
}
"""Supported bases by the ``model_type`` of their text config."""

REFUSED: dict[str, str] = {
    "falcon": "its blocks do not receive keywords, by which the shadow's state travels",
    "bloom": "its blocks do not receive keywords, by which the shadow's state travels",
}
"""Bases that are known not to work, and why."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the row for a base's config.

    Raises:
        UnsupportedArchitectureError: naming the supported ones and how to add one.
    """
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
    raise UnsupportedArchitectureError(
        f"model_type {model_type!r} is not supported{reason}; supported are {', '.join(sorted(ARCHITECTURES))}. To add "
        "one whose blocks receive unknown keywords, add a row: shadowtune.attach.ARCHITECTURES[model_type] = "
        "Architecture(decoder, blocks)"
    )
