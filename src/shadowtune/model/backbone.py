"""The backbone of a shadow: a small network of the base's architecture (a mirror), or a pretrained language model.

A mirror has no embeddings of its own; its input is the base's, which are frozen. A pretrained backbone keeps its own
embedding, frozen too and therefore a buffer: every parameter of a shadow is trained.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowtune.attach.architectures import ARCHITECTURES, architecture_of
from shadowtune.attach.sharding import whole_state, without_partitioning
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.kernels.linear_cross_entropy import LogitsTransform
from shadowtune.errors import ConfigError

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Sizes of a mirror that ``ShadowConfig`` sets."""
PER_BLOCK = ("layer_types", "no_rope_layers")
"""Config values that are lists with an entry per block."""


class FrozenEmbedding(nn.Module):
    """The token embedding of a pretrained backbone, saved with the shadow but not trained.

    Args:
        config: the backbone's.
        weight: (V, d_s); None allocates one that is loaded later.
    """

    weight: Tensor

    def __init__(self, config: PreTrainedConfig, weight: Tensor | None = None) -> None:
        super().__init__()
        rows = torch.empty(config.vocab_size, config.hidden_size) if weight is None else weight.detach().clone()
        self.register_buffer("weight", rows)
        self.scale = config.hidden_size**0.5 if architecture_of(config).scales_embeddings else 1.0

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (B, T, d_s) of token ids (B, T)."""
        return F.embedding(input_ids, self.weight) * torch.tensor(self.scale, dtype=self.weight.dtype)


def mirror_config(base: PreTrainedConfig, config: ShadowConfig) -> PreTrainedConfig:
    """Return the config of a mirrored backbone: the base's, L_s blocks deep, with the sizes that ``config`` overrides.

    Raises:
        ConfigError: if the sizes do not fit each other, as 7 heads in a width of 64.
    """
    text = base.get_text_config(decoder=True)
    mirror = copy.deepcopy(text)
    layers = None if config.init_layers is None else blocks_to_copy(config.init_layers, text)
    mirror.num_hidden_layers = config.num_shadow_layers
    without_quantization(mirror)
    architecture = ARCHITECTURES[text.model_type]
    overrides: dict[str, Any] = dict(architecture.mirror) if layers is None else {}
    for name in SIZES:
        value = getattr(config, name)
        if value is not None:
            overrides[_config_name(mirror, architecture.names.get(name, name))] = value
    if layers is not None:
        overrides |= _settings_of_blocks(text, layers)
    elif isinstance(mirror.to_dict().get("layer_types"), list):
        overrides["layer_types"] = ["full_attention"] * config.num_shadow_layers
    for name, value in overrides.items():
        setattr(mirror, name, value)
    for name in architecture.follow_width:
        setattr(mirror, name, mirror.hidden_size)
    heads, kv_heads = mirror.num_attention_heads, mirror.to_dict().get("num_key_value_heads")
    if kv_heads is not None and heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if "head_dim" not in mirror.to_dict() and mirror.hidden_size % heads:
        raise ConfigError(f"hidden_size {mirror.hidden_size} must be a multiple of num_attention_heads {heads}")
    mirror._attn_implementation = text._attn_implementation
    return mirror


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove name and quantization of a base from a copy of its config, which a backbone does not share."""
    vars(config).pop("quantization_config", None)
    config.name_or_path = ""
    return config


def blocks_to_copy(layers: Sequence[int], text: PreTrainedConfig) -> tuple[int, ...]:
    """Return ``init_layers`` counted from 0; raises ConfigError for a block that the base does not have."""
    depth = text.num_hidden_layers
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"init_layers names block {layer}, but the base has {depth}: 0 to {depth - 1}, or -{depth} to -1"
            )
    return tuple(layer % depth for layer in layers)


def _settings_of_blocks(text: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the config values per block of the chosen blocks: a copy keeps its window and its rotations."""
    lists = {name: value for name, value in text.to_dict().items() if name in PER_BLOCK and value is not None}
    settings = {name: [value[i] for i in layers] for name, value in lists.items()}
    for layer, kind in zip(layers, settings.get("layer_types", ()), strict=False):
        if "attention" not in kind or "linear" in kind:
            usable = [i for i, other in enumerate(lists["layer_types"]) if other == "full_attention"]
            raise ConfigError(
                f"init_layers names block {layer}, a {kind} block of {text.model_type}, whose cache does not count "
                f"tokens, so a shadow cannot have it; its full_attention blocks are {', '.join(map(str, usable))}"
            )
    return settings


def sizes_of(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return the sizes of a backbone by their names in ``ShadowConfig``; None where its architecture has none."""
    values, names = config.to_dict(), ARCHITECTURES[config.model_type].names
    sizes = {"num_shadow_layers": config.num_hidden_layers}
    for name in SIZES:
        own = names.get(name, name)
        sizes[name] = values.get(config.attribute_map.get(own, own))
    return sizes


def _config_name(config: PreTrainedConfig, name: str) -> str:
    """Return the architecture's own name of a size; raises ConfigError if it has none."""
    own = config.attribute_map.get(name, name)
    if own not in config.to_dict():
        raise ConfigError(f"{name} cannot be set for a mirror of {config.model_type}: its config has no such field")
    return own


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the network of a backbone's config, randomly initialized, without token embeddings."""
    small = copy.deepcopy(config)
    small.vocab_size, small.pad_token_id = 1, None  # embedding and head are discarded: do not initialize them
    with without_partitioning():
        model = AutoModelForCausalLM.from_config(small, trust_remote_code=False)
    backbone = architecture_of(config).decoder_of(model)
    backbone.set_input_embeddings(cast(nn.Module, None))  # never called: inputs_embeds are passed
    backbone.config.vocab_size, backbone.config.pad_token_id = config.vocab_size, config.pad_token_id
    return backbone


@torch.no_grad()
def copy_position_embeddings(backbone: PreTrainedModel, base: PreTrainedModel) -> None:
    """Copy the base's learned absolute positions, where the architecture has them, into a mirror."""
    architecture = architecture_of(base.config)
    if architecture.position_embeddings is None or backbone.config.hidden_size != base.config.hidden_size:
        return
    source = architecture.decoder_of(base).get_submodule(architecture.position_embeddings)
    target = backbone.get_submodule(architecture.position_embeddings)
    target.load_state_dict(whole_state(source))


@dataclass(frozen=True)
class PretrainedBackbone:
    """The parts of a pretrained causal language model that a shadow uses."""

    network: PreTrainedModel
    """The model without embedding and head."""
    embedding: FrozenEmbedding
    """Its own token embedding, (V, d_s)."""
    head: Tensor | None = None
    """Its head (V, d_s), to fit a projection to; not needed beside ``projection``."""
    logits_transform: LogitsTransform | None = None
    """What it applies to logits after the head."""
    projection: Tensor | None = None
    """(d, d_s), of a source that has one; None has it fitted."""


def load_pretrained_backbone(path_or_id: str, vocab_size: int, **kwargs: Any) -> PretrainedBackbone:
    """Load a pretrained causal language model as a backbone.

    Raises:
        ConfigError: if it cannot be loaded, or its vocabulary has another size than the base's.
    """
    try:
        with without_partitioning():
            model = AutoModelForCausalLM.from_pretrained(path_or_id, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the backbone {path_or_id}: {str(error).splitlines()[0]}") from None
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    own_size = embedding.weight.shape[0]
    if own_size != vocab_size:
        raise ConfigError(
            f"the backbone {path_or_id} has a vocabulary of {own_size} tokens, the base one of {vocab_size}; "
            "a shadow reads the same tokens as its base"
        )
    architecture = architecture_of(model.config)
    network = architecture.decoder_of(model)
    frozen = FrozenEmbedding(network.config, embedding.weight)
    network.set_input_embeddings(cast(nn.Module, None))
    transform = architecture.logits_transform(model.config.get_text_config(decoder=True))
    return PretrainedBackbone(network, frozen, model.get_output_embeddings().weight.detach(), transform)
