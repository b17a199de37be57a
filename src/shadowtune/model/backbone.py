"""The small network of a shadow: a mirror of the base's architecture, or a pretrained causal language model.

A mirror has no embeddings of its own; it is fed the base's, which are frozen. A pretrained backbone keeps its own,
frozen too and therefore a buffer: every parameter of a shadow is trained.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowtune.attach.architectures import ARCHITECTURES, architecture_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import ConfigError


class FrozenEmbedding(nn.Module):
    """A token embedding that is saved with the shadow but not trained; weight (V, d_s), input (B, T) ids."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows (B, T, d_s) of the given ids."""
        return F.embedding(input_ids, self.weight)


def mirror_config(base: PreTrainedConfig, config: ShadowConfig) -> PreTrainedConfig:
    """Return the config of a mirrored backbone: the base's, L_s blocks deep, with the sizes that ``config`` overrides.

    Raises:
        ConfigError: if the sizes do not fit each other, as 7 heads in a width of 64.
    """
    text = base.get_text_config(decoder=True)
    mirror = copy.deepcopy(text)
    mirror.num_hidden_layers = config.num_shadow_layers
    overrides: dict[str, Any] = dict(ARCHITECTURES[text.model_type].mirror)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        value = getattr(config, name)
        if value is not None:
            overrides[_config_name(mirror, name)] = value
    if isinstance(mirror.to_dict().get("layer_types"), list):
        overrides["layer_types"] = ["full_attention"] * config.num_shadow_layers
    for name, value in overrides.items():
        setattr(mirror, name, value)
    heads, kv_heads = mirror.num_attention_heads, mirror.to_dict().get("num_key_value_heads")
    if kv_heads is not None and heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if "head_dim" not in mirror.to_dict() and mirror.hidden_size % heads:
        raise ConfigError(f"hidden_size {mirror.hidden_size} must be a multiple of num_attention_heads {heads}")
    mirror._attn_implementation = text._attn_implementation
    return mirror


def _config_name(config: PreTrainedConfig, name: str) -> str:
    """Return the architecture's own word for a size, or say that it has none."""
    own = config.attribute_map.get(name, name)
    if own not in config.to_dict():
        raise ConfigError(f"{name} cannot be set for a mirror of {config.model_type}: its config has no such field")
    return own


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the network of a mirror's config, randomly initialized, without token embeddings."""
    backbone = AutoModel.from_config(copy.deepcopy(config))
    backbone.set_input_embeddings(cast(nn.Module, None))  # never called: inputs_embeds are passed
    return backbone


@torch.no_grad()
def copy_position_embeddings(backbone: PreTrainedModel, base: PreTrainedModel) -> None:
    """Start a mirror's learned absolute positions, where the architecture has them, from the base's."""
    architecture = architecture_of(base.config)
    if architecture.position_embeddings is None or backbone.config.hidden_size != base.config.hidden_size:
        return
    source = architecture.decoder_of(base).get_submodule(architecture.position_embeddings)
    target = backbone.get_submodule(architecture.position_embeddings)
    target.load_state_dict(source.state_dict())


def load_pretrained_backbone(
    path_or_id: str, vocab_size: int, **kwargs: Any
) -> tuple[PreTrainedModel, FrozenEmbedding]:
    """Load a pretrained causal language model as a backbone; return its network and its frozen embedding.

    Raises:
        ConfigError: if its vocabulary has another size than the base's.
    """
    model = AutoModelForCausalLM.from_pretrained(path_or_id, **kwargs)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    own_size = embedding.weight.shape[0]
    if own_size != vocab_size:
        raise ConfigError(
            f"the backbone {path_or_id} has a vocabulary of {own_size} tokens, the base one of {vocab_size}; "
            "a shadow reads the same tokens as its base"
        )
    network = architecture_of(model.config).decoder_of(model)
    assert isinstance(network, PreTrainedModel)
    frozen = FrozenEmbedding(embedding.weight)
    network.set_input_embeddings(cast(nn.Module, None))
    return network, frozen
