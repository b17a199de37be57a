"""The table of supported bases: where a base keeps its blocks, and what it does after its head.

To add an architecture, add a row, and a tiny config of it to ``tests/support/bases.py``: the row is right when the
tests of attach and model pass. The one requirement: the model hands unknown keywords down to every decoder block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.errors import UnsupportedArchitectureError

Finish = Callable[[Tensor], Tensor]
"""What a model does to each logit after its head's product."""


def _nothing(config: Any) -> Finish | None:
    return None


def _softcap(config: Any) -> Finish | None:
    cap = config.final_logit_softcapping
    return None if cap is None else lambda logits: (logits / cap).tanh() * cap


def _scale_down(config: Any) -> Finish | None:
    return lambda logits: logits / config.logits_scaling


@dataclass(frozen=True)
class Architecture:
    """What one kind of base looks like from outside."""

    decoder: str
    """Path from the task model to the innermost headless model, whose output has ``last_hidden_state``."""
    blocks: str
    """Path from the headless model to the list of decoder blocks."""
    finish: Callable[[Any], Finish | None] = _nothing
    """What the model does to each logit, given its text config; None if nothing."""
    logit_settings: tuple[str, ...] = ()
    """Config values that ``finish`` reads."""
    mirror: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Config values that keep a mirrored backbone small and made of attention blocks only."""
    position_embeddings: str | None = None
    """Path from the headless model to learned absolute positions, which a mirror starts from."""
    scales_embeddings: bool = False
    """Whether the input embedding multiplies its rows by sqrt(width)."""
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """The config's own words for sizes of ``ShadowConfig``, where transformers does not translate them."""
    follow_width: tuple[str, ...] = ()
    """Config values that a mirror of another width must set to its width too."""
    packs: bool = False
    """Whether documents in one row stay apart where position ids start anew. They do not where a recurrence runs on
    (qwen3_next), or where the attention mask is made without looking at the positions (opt, gpt_oss)."""

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
            f"{type(model).__name__} has no part {path!r}, where its row in shadowtune.attach.ARCHITECTURES expects it"
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
