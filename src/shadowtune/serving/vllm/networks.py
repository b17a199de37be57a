"""vLLM's own models of base and backbone, and the boundaries between the base's blocks.

vLLM's native models hand two tensors from block to block, x and a residual with h = x + residual, and add them in the
next block's norm. A block whose residual is None takes x for h. So a hook on a block returns (h', None), and the next
block begins as the first one does.
"""

import copy
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.transformers.base import Base as TransformersBackend

from shadowtune.attach.architectures import architecture_of
from shadowtune.core.boundary import Boundaries
from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.serving.vllm.support import classifies

UNUSED_VOCABULARY = 64
"""Tokens of a backbone's embedding and head in vLLM, neither of which is used: what vLLM pads a vocabulary to."""
DENSE = {"qwen3_moe": "qwen3"}
"""Architectures with experts -> the one whose blocks they have without any, which vLLM asks for then."""


def build_network(vllm_config: VllmConfig, hf_config: PreTrainedConfig, prefix: str) -> nn.Module:
    """Build vLLM's causal language model of a config: its native one, or its Transformers backend where it has none.

    Args:
        vllm_config: of the whole model.
        hf_config: of the network; it is copied.
        prefix: of the names of its layers, which are the keys of vLLM's key-value cache.

    Raises:
        UnsupportedArchitectureError: if vLLM has no model for it.
    """
    own = copy.deepcopy(hf_config)
    own.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[own.model_type]]  # also of the base of a classifier
    inner = vllm_config.with_hf_config(own)
    model_config = inner.model_config
    model_config.runner_type, model_config.convert_type = "generate", "none"
    text = model_config.hf_config.get_text_config()
    model_config.hf_text_config = text  # with_hf_config keeps the outer one
    model_config.model_arch_config = model_config.get_model_arch_config()
    values = text.to_dict()
    slides = all(kind == "sliding_attention" for kind in values.get("layer_types") or ())
    inner.cache_config = copy.copy(inner.cache_config)  # whose window was read from the outer config too
    inner.cache_config.sliding_window = values.get("sliding_window") if slides else None
    try:
        return initialize_model(vllm_config=inner, prefix=prefix)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedArchitectureError(
            f"vLLM cannot run the {hf_config.model_type} model {prefix!r} of this shadow: {error}; use the engine of "
            "shadowtune serve cloud"
        ) from error


def base_network(vllm_config: VllmConfig, config: ShadowModelConfig, prefix: str) -> nn.Module:
    """Build vLLM's model of the base; that of a classifier's base has no head of its own."""
    assert config.base_config is not None
    own = copy.deepcopy(config.base_config)
    if classifies(config):
        own.tie_word_embeddings = True
    return build_network(vllm_config, own, prefix)


def backbone_network(vllm_config: VllmConfig, config: PreTrainedConfig, prefix: str) -> nn.Module:
    """Build the network of a backbone's config, with a small embedding and head that are never used."""
    small = _dense(config)
    small.vocab_size, small.pad_token_id, small.tie_word_embeddings = UNUSED_VOCABULARY, None, True
    return build_network(vllm_config, small, prefix)


def _dense(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a backbone's config, of an architecture without experts if no block has any."""
    values = config.to_dict()
    kind, depth = DENSE.get(config.model_type), config.num_hidden_layers
    if kind is None or values["decoder_sparse_step"] <= depth:
        return copy.deepcopy(config)
    values.pop("model_type")
    values.pop("architectures", None)
    return AutoConfig.for_model(kind, **values)


def blocks_of(model: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    """Return the decoder blocks of one of vLLM's models.

    Native models name their parts as transformers does; the Transformers backend has the headless model as ``model``.

    Raises:
        UnsupportedArchitectureError: if they are elsewhere, or not as many as the config says.
    """
    architecture, depth = architecture_of(config), config.get_text_config(decoder=True).num_hidden_layers
    decoder = "model" if isinstance(model, TransformersBackend) else architecture.decoder
    try:
        blocks = model.get_submodule(f"{decoder}.{architecture.blocks}")
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != depth:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} of vLLM has no {depth} blocks at {decoder}.{architecture.blocks}, between which "
            "the shadow acts"
        )
    return blocks


class BoundaryHooks:
    """Hooks that apply a shadow's boundaries between the blocks of the base, and the shadow state of the running call.

    The model runner of vLLM calls the model from one thread, one call after the other.
    """

    def __init__(self, boundaries: Boundaries, blocks: nn.ModuleList) -> None:
        self.boundaries = boundaries
        self.parameters: list[Any] = []
        self.states: Tensor | None = None
        if boundaries.first == 0:
            blocks[0].register_forward_pre_hook(_FirstBlockHook(self, blocks[0]), with_kwargs=True)
        for depth in range(max(boundaries.first, 1), len(blocks)):
            blocks[depth - 1].register_forward_hook(_NextBlockHook(self, depth - boundaries.first))

    def split(self) -> None:
        """Split the stacked parameters into those of each boundary, once after they have been loaded."""
        self.parameters = self.boundaries.unstack()

    def apply(self, index: int, hidden_states: Tensor) -> Tensor:
        """Apply boundary ``index`` to h (T, d) and update the shadow state; return h', same shape and dtype."""
        hidden_states, self.states = self.boundaries.apply_boundary(self.parameters[index], hidden_states, self.states)
        return hidden_states


class _FirstBlockHook:
    """Pre-hook on the first block, whose argument ``hidden_states`` differs in position between models."""

    def __init__(self, hooks: BoundaryHooks, block: nn.Module) -> None:
        self.hooks = hooks
        names = list(inspect.signature(block.forward).parameters)
        if "hidden_states" not in names:
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} of vLLM takes no hidden_states, which a shadow that begins at block 0 corrects"
            )
        self.position = names.index("hidden_states")

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self.hooks.apply(0, kwargs["hidden_states"])}
        corrected = self.hooks.apply(0, args[self.position])
        return (*args[: self.position], corrected, *args[self.position + 1 :]), kwargs


class _NextBlockHook:
    """Hook on a block's output, which is the input of the next block."""

    def __init__(self, hooks: BoundaryHooks, index: int) -> None:
        self.hooks, self.index = hooks, index

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return self.hooks.apply(self.index, output)
        x, residual, *others = output
        return self.hooks.apply(self.index, x if residual is None else x + residual), None, *others
