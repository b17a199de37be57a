"""The table of supported base architectures: paths of decoder and blocks, logits transform, settings of mirrors.

To add an architecture, add an entry, and a tiny config of it to ``tests/support/bases.py``: the entry is right when the
tests of attach and model pass. The one requirement: the model passes unknown keywords down to every decoder block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.core.kernels.linear_cross_entropy import LogitsTransform
from shadowtune.errors import ConfigError, UnsupportedArchitectureError


def _no_transform(config: Any) -> LogitsTransform | None:
    return None


def _softcap(config: Any) -> LogitsTransform | None:
    cap = config.final_logit_softcapping
    return None if cap is None else lambda logits: (logits / cap).tanh() * cap


def _scale_down(config: Any) -> LogitsTransform | None:
    return lambda logits: logits / config.logits_scaling


@dataclass(frozen=True)
class Architecture:
    """Structure and settings of one base architecture."""

    decoder: str
    """Path from the task model to the innermost headless model, whose output has ``last_hidden_state``."""
    blocks: str
    """Path from the headless model to the list of decoder blocks."""
    logits_transform: Callable[[Any], LogitsTransform | None] = _no_transform
    """From the text config: the function applied to the logits after the head's product; None if there is none."""
    logit_settings: tuple[str, ...] = ()
    """Config values that ``logits_transform`` reads."""
    mirror: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Config values of a mirrored backbone that keep it small and its blocks attention blocks."""
    position_embeddings: str | None = None
    """Path from the headless model to learned absolute positions, which a mirror copies."""
    scales_embeddings: bool = False
    """Whether the input embedding is multiplied by sqrt(width)."""
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Sizes of ``ShadowConfig`` by the config's own names, where its ``attribute_map`` lacks them."""
    follow_width: tuple[str, ...] = ()
    """Config values that must equal the width of a mirror of another width."""
    packs: bool = False
    """Whether packed documents stay independent when position ids restart. They do not with a recurrence (qwen3_next),
    or when the attention mask does not depend on the positions (opt, gpt_oss)."""

    def decoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the headless model inside a causal LM or a sequence classifier.

        Raises:
            UnsupportedArchitectureError: if the model has no such part, being built in another way.
        """
        return cast(PreTrainedModel, _part(model, self.decoder))

    def blocks_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the decoder blocks of a causal LM or a sequence classifier.

        Raises:
            UnsupportedArchitectureError: if the model has no such part, being built in another way.
        """
        return cast(nn.ModuleList, _part(self.decoder_of(model), self.blocks))


def _part(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no part {path!r}, which its entry in ARCHITECTURES (shadowtune.attach) names; "
            "a base is a model with its task head, of AutoModelForCausalLM or AutoModelForSequenceClassification"
        ) from None


_LLAMA_LIKE = Architecture("model", "layers", packs=True)
_GEMMA_LIKE = Architecture(
    "model", "layers", _softcap, ("final_logit_softcapping",), scales_embeddings=True, packs=True
)
_DENSE = MappingProxyType({"decoder_sparse_step": 1_000_000})
# The fewest experts whose router learns: the share of a single one is always 1.
_TWO_EXPERTS = MappingProxyType({"num_local_experts": 2, "num_experts_per_tok": 2})

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "gemma2": _GEMMA_LIKE,
    "gemma3_text": _GEMMA_LIKE,
    "granite": Architecture("model", "layers", _scale_down, ("logits_scaling",), packs=True),
    "gpt2": Architecture(
        "transformer", "h", position_embeddings="wpe", names={"intermediate_size": "n_inner"}, packs=True
    ),
    "gpt_neox": Architecture("gpt_neox", "layers", packs=True),
    "opt": Architecture(
        "model.decoder",
        "layers",
        position_embeddings="embed_positions",
        names={"intermediate_size": "ffn_dim"},
        follow_width=("word_embed_proj_dim",),
    ),
    "mixtral": Architecture("model", "layers", mirror=_TWO_EXPERTS, packs=True),
    "gpt_oss": Architecture("model", "layers", mirror=_TWO_EXPERTS),
    "qwen3_moe": Architecture("model", "layers", mirror=_DENSE, packs=True),
    "qwen3_next": Architecture("model", "layers", mirror=_DENSE),
}
"""Supported bases by the ``model_type`` of their text config."""

REFUSED: dict[str, str] = {
    "falcon": "its blocks do not receive keywords, which carry the shadow's state",
    "bloom": "its blocks do not receive keywords, which carry the shadow's state",
}
"""Architectures that are known not to work, and why."""


def check_unwrapped(base: Any) -> None:
    """Raise ConfigError unless a base is a transformers model itself: a wrapper around it has other calls and names."""
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(
            f"the base is of type {type(base).__name__}, which is not a transformers model; pass the model itself: of "
            "a PeftModel base.unload(), or base.merge_and_unload() to keep what a LoRA adapter learned; compile or "
            "parallelize the shadow model, not its base"
        )
    if base.config.model_type == "shadow":
        raise ConfigError(f"the base is a {type(base).__name__}, which has a base itself; pass that: model.base")


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the entry for a base's config.

    Raises:
        UnsupportedArchitectureError: with the supported ones and how to add one.
    """
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
    raise UnsupportedArchitectureError(
        f"model_type {model_type!r} is not supported{reason}; supported are {', '.join(sorted(ARCHITECTURES))}. To add "
        "one whose blocks receive unknown keywords: from shadowtune.attach import ARCHITECTURES, Architecture; "
        "ARCHITECTURES[model_type] = Architecture(decoder, blocks)"
    )
