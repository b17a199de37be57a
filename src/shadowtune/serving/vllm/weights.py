"""Weights of base and shadow for vLLM's models: their names in checkpoints, and the check of the base."""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from shadowtune.attach.architectures import architecture_of
from shadowtune.errors import CheckpointError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.fingerprint import CheckpointCheck
from shadowtune.model.loading import check_tensors
from shadowtune.model.shadow import Shadow
from shadowtune.serving.vllm.support import classifies

logger = logging.getLogger(__name__)


def load_base_weights(model: Any, config: ShadowModelConfig, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load the base into vLLM's model of it; return the names of its parameters.

    Raises:
        CheckpointError: if these are other weights than the shadow was trained beside, or none.
    """
    assert config.base_config is not None
    check = CheckpointCheck(config.base_config, config.base_signature, config.base_fingerprint)
    if classifies(config):  # the base's own head, for tokens or for other classes, is not used
        weights = ((name, tensor) for name, tensor in weights if name != check.head and not name.startswith("score."))
    loaded: set[str] = model.load_weights(check.watch(weights))
    if not loaded:
        raise CheckpointError(
            f"vLLM read no weights of the base {config.base_name_or_path}: use --load-format auto or safetensors, "
            "whose loaders read a second model"
        )
    if not check.agrees():
        raise CheckpointError(
            f"wrong base: {config.base_name_or_path} has other weights than those that the shadow was trained beside "
            f"({config.base_fingerprint})"
        )
    if check.unseen:
        logger.warning("%d weights of the base were not compared, such as %s", len(check.unseen), check.unseen[0])
    return loaded


def load_shadow_weights(
    shadow: nn.Module, config: ShadowModelConfig, tensors: Mapping[str, Tensor], path: str
) -> set[str]:
    """Load a shadow's tensors into its modules in vLLM; return the names of their parameters.

    The backbone is cast to vLLM's dtype; other tensors keep the one that they were saved in. The draft head is left
    out: the attached model does not use it.

    Args:
        shadow: a ``serving.vllm.model.ShadowNetwork``.
        config: the shadow's.
        tensors: of the saved shadow.
        path: where they were read, for errors.

    Raises:
        CheckpointError: if they do not fit the config.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("shadow.")}
    assert config.base_config is not None and config.backbone_config is not None
    with torch.device("meta"):
        sizes = (config.shadow_config, config.base_config, config.backbone_config)
        expected = Shadow(*sizes, draft_vocabulary_size=config.draft_vocabulary_size)
    check_tensors({"shadow": expected}, tensors, path)
    tensors = {name.removeprefix("shadow."): tensor for name, tensor in tensors.items()}
    backbone: Any = dict(shadow.named_children()).get("backbone")
    own = {
        name: tensor for name, tensor in shadow.state_dict(keep_vars=True).items() if not name.startswith("backbone.")
    }
    for name, parameter in own.items():
        parameter.data = tensors[name].to(parameter.device)
    if backbone is None:
        return set(own)
    start = "backbone."
    saved = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    loaded = backbone.load_weights(checkpoint_tensors(config.backbone_config, saved).items())
    return {*own, *(f"{start}{name}" for name in {*loaded, *_vocabulary_parameters(backbone)})}


def checkpoint_tensors(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a headless network by the names that checkpoints of its whole model have.

    Some architectures store weights otherwise than transformers holds them, such as each expert by itself.
    """
    small = copy.deepcopy(config)
    small.vocab_size, small.pad_token_id = 1, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, trust_remote_code=False)
    decoder = architecture_of(config).decoder
    named = {f"{decoder}.{name}": tensor for name, tensor in tensors.items()}
    converted: dict[str, Tensor] = revert_weight_conversion(model, named)
    return converted


def _vocabulary_parameters(network: nn.Module) -> set[str]:
    """Return the names of the parameters of a network's embedding and head, which a backbone does not use."""
    return {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, VocabParallelEmbedding)
        for name, _ in module.named_parameters()
    }
