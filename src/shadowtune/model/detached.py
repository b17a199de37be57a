r"""Build the detached shadow as a plain transformers model.

head(Proj(z)) = (W_head W_proj) z: the projection folds into the head, and the projection of the base's embeddings folds
into the embedding. The result is exactly an ordinary model of the backbone's architecture with its own head.
"""

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.sharding import device_of, whole_state, whole_tensor
from shadowtune.errors import ShadowtuneError
from shadowtune.model.checkpoint import keep_rope_theta, write_tensors
from shadowtune.model.files import WEIGHTS
from shadowtune.model.shadow import Shadow


@torch.no_grad()
def detached_causal_lm(
    base: PreTrainedModel, shadow: Shadow, generation_config: GenerationConfig | None = None
) -> PreTrainedModel:
    """Build the detached shadow as a causal language model.

    Args:
        base: the base.
        shadow: its shadow.
        generation_config: the attached model's, of which the result gets a copy; None takes the base's.

    Raises:
        ShadowtuneError: if base and backbone transform logits differently (soft-capping, scaling), so that no plain
            model of the backbone's architecture has the same logits; or if the base's embedding or head is offloaded.
    """
    _check_in_memory(base)
    architecture, base_config = architecture_of(base.config), base.config.get_text_config(decoder=True)
    own = architecture_of(shadow.backbone.config)
    if own.logits_transform is not architecture.logits_transform:
        raise ShadowtuneError(
            f"a {shadow.backbone.config.model_type} shadow of a {base_config.model_type} base has no plain form: the "
            "two architectures treat logits differently"
        )
    settings = {name: getattr(base_config, name) for name in architecture.logit_settings}
    embeddings, head = _embeddings(base, shadow), _folded_head(base.get_output_embeddings(), shadow)
    tied = torch.equal(embeddings, head)  # one matrix in memory and in files, as for a tied base and an equal width
    plain = _plain(AutoModelForCausalLM, base, shadow, tie_word_embeddings=tied, **settings)
    plain.get_output_embeddings().weight.copy_(head)
    plain.generation_config = copy.deepcopy(generation_config or base.generation_config)
    ends = None if plain.generation_config is None else plain.generation_config.eos_token_id
    if ends is not None:  # some converters read one token from config.json only
        plain.config.eos_token_id = ends[0] if isinstance(ends, list) else ends
    return plain


@torch.no_grad()
def detached_classifier(
    base: PreTrainedModel, shadow: Shadow, score: nn.Linear, config: PreTrainedConfig
) -> PreTrainedModel:
    """Build the detached shadow with its head ``score`` (d -> classes) as a sequence classifier.

    Args:
        base: the base.
        shadow: its shadow.
        score: the shadow's head.
        config: of the attached model, with the classes and the pad token.
    """
    names = ("problem_type", "id2label", "label2id", "pad_token_id")
    settings = {name: copy.deepcopy(getattr(config, name)) for name in names}
    plain = _plain(AutoModelForSequenceClassification, base, shadow, **settings)
    cast(nn.Linear, plain.get_submodule("score")).weight.copy_(_folded_head(score, shadow))
    return plain


def _check_in_memory(base: PreTrainedModel) -> None:
    """Raise ShadowtuneError if the base's embedding or head, which become the plain model's, are offloaded."""
    for name, module in (("embedding", base.get_input_embeddings()), ("head", base.get_output_embeddings())):
        if module.weight.is_meta:
            raise ShadowtuneError(
                f"the base's {name} is offloaded, and the detached model needs it; load the base without device_map, "
                "or with this part in memory"
            )


def write_plain(model: PreTrainedModel, directory: Path) -> None:
    """Write config, generation config and weights of a plain model into ``directory``; the weights with a checksum.

    Tensors have transformers' names for files, and tied ones are written once.
    """
    model.save_pretrained(directory, max_shard_size="1TB")
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()  # the tensors stay mapped; a new file takes the name
    write_tensors(directory, tensors)


def _plain(auto: Any, base: PreTrainedModel, shadow: Shadow, **changes: Any) -> PreTrainedModel:
    """A new task model with the backbone's network and embeddings, and a head that is still random."""
    config = copy.deepcopy(shadow.backbone.config)
    config.name_or_path = ""
    config.vocab_size = base.config.get_text_config(decoder=True).vocab_size
    for name, value in changes.items():
        setattr(config, name, value)
    keep_rope_theta(config)
    plain = auto.from_config(config, dtype=shadow.boundaries.injection_downs.dtype).to(device_of(base)).eval()
    missing = architecture_of(config).decoder_of(plain).load_state_dict(whole_state(shadow.backbone), strict=False)
    assert not missing.unexpected_keys
    plain.get_input_embeddings().weight.copy_(_embeddings(base, shadow))
    return plain


def _folded_head(head: Any, shadow: Shadow) -> Tensor:
    """W_head W_proj, in the shadow's precision."""
    weight = whole_tensor(head.weight).to(shadow.boundaries.injection_downs.dtype)
    return weight @ whole_tensor(shadow.projection.weight) if isinstance(shadow.projection, nn.Linear) else weight


def _embeddings(base: PreTrainedModel, shadow: Shadow) -> Tensor:
    """The backbone's input embeddings (V, d_s)."""
    if shadow.embedding is not None:
        return shadow.embedding.weight
    embedding = cast(nn.Embedding, base.get_input_embeddings())
    rows = whole_tensor(embedding.weight).to(shadow.boundaries.injection_downs.dtype)
    if not isinstance(shadow.input_projection, nn.Linear):
        return rows
    rows = rows @ whole_tensor(shadow.input_projection.weight).T
    if architecture_of(base.config).scales_embeddings:  # the base scales by sqrt(d), the plain model by sqrt(d_s)
        rows = rows * math.sqrt(shadow.input_projection.in_features / shadow.input_projection.out_features)
    return rows
