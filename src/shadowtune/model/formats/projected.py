"""Reader of projected causal language models: head(Proj(z)), a small network with the head of a larger base.

shadow-peft exports a detached shadow in this form (``model_type: causal_lm_with_hidden_projection``); shadow-peft and
PEFT both start a shadow from one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shadowtune.attach.architectures import architecture_of
from shadowtune.errors import CheckpointError
from shadowtune.model.backbone import FrozenEmbedding
from shadowtune.model.checkpoint import find_file, read_tensors
from shadowtune.model.formats.third_party import PROJECTED, backbone_keys, load_backbone_config, read_json

NEUTRAL = {"final_logit_softcapping": None, "logits_scaling": 1.0}
"""Values with which an architecture does not transform its logits, like a projected model."""


@dataclass(frozen=True)
class Projected:
    """The parts of a projected causal language model."""

    backbone_config: PreTrainedConfig
    """Of width d_s."""
    backbone_state: dict[str, Tensor]
    """Tensors of the network without its embedding, by their names in our ``Shadow.backbone``."""
    embedding: FrozenEmbedding
    """(V, d_s)."""
    projection: Tensor
    """(d, d_s)."""
    head: Tensor | None
    """(V, d); None where the base's is meant, as in files of PEFT."""
    generation: GenerationConfig | None
    """Its generation config, if it has one."""


def is_projected(path_or_id: str, **hub: Any) -> bool:
    """Return whether a directory or Hub repository holds a projected causal language model."""
    file = find_file(path_or_id, CONFIG_NAME, **hub)
    return file is not None and read_json(file).get("model_type") in PROJECTED


def read_projected(path_or_id: str, **hub: Any) -> Projected:
    """Read a projected causal language model.

    Raises:
        CheckpointError: if a file or tensor is missing or damaged.
        ConfigError: if the config of its network cannot be read.
    """
    config = load_backbone_config(path_or_id)
    tensors = read_tensors(path_or_id, checked=False, **hub)
    keys = backbone_keys(config, nested=True)
    prefix = f"shadow_model.{keys.prefix}"
    named = {
        "projection": "shadow_hidden_projection.weight",
        "embedding": f"shadow_model.{keys.embedding_key}",
    }
    missing = [key for key in named.values() if key not in tensors]
    if missing:
        raise CheckpointError(f"{path_or_id} has no {', '.join(missing)}: it is damaged")
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name != named["embedding"]
    }
    has_generation = find_file(path_or_id, GENERATION_CONFIG_NAME, **hub) is not None
    return Projected(
        config,
        state,
        FrozenEmbedding(config, tensors[named["embedding"]]),
        tensors[named["projection"]],
        tensors.get("lm_head.weight"),
        GenerationConfig.from_pretrained(path_or_id, **hub) if has_generation else None,
    )


@torch.no_grad()
def plain_of(projected: Projected, source: str) -> PreTrainedModel:
    """Build the plain model with the same logits, head(Proj(z)) = (W_head W_proj) z, or raise CheckpointError."""
    if projected.head is None:
        raise CheckpointError(
            f"{source} has no lm_head.weight: it was saved without a head, so it is no model by itself; start a shadow "
            f"from it (backbone: {source}) beside a base, whose head it uses"
        )
    config = projected.backbone_config
    architecture = architecture_of(config)
    config.tie_word_embeddings = False
    for name in architecture.logit_settings:
        setattr(config, name, NEUTRAL[name])
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=projected.head.dtype, trust_remote_code=False
    ).eval()
    decoder: Any = architecture.decoder_of(plain)
    decoder.get_input_embeddings().weight.copy_(projected.embedding.weight)
    try:
        found = decoder.load_state_dict(projected.backbone_state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit its config.json: {str(error).splitlines()[-1].strip()}") from None
    embedding = backbone_keys(config, nested=False).embedding_key
    errors = [f"missing {name}" for name in found.missing_keys if name != embedding]
    errors += [f"unexpected {name}" for name in found.unexpected_keys]
    if errors:
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(errors[:3])}")
    plain.get_output_embeddings().weight.copy_(projected.head.float() @ projected.projection.float())
    if projected.generation is not None:
        plain.generation_config = projected.generation
    return plain
