"""The attached model in vLLM: its own models of base and backbone, and our boundaries between the base's blocks.

The names of the parameters are those of a saved shadow, ``shadow.boundaries.injection_downs`` for instance, below
``network``; the base's are vLLM's own, below ``network.base``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from shadowtune.core.boundary import Boundaries
from shadowtune.errors import ConfigError
from shadowtune.model.backbone import FrozenEmbedding
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.loading import check_tensors, drop_unusable_drafts
from shadowtune.models import resolve
from shadowtune.serving.vllm.networks import BoundaryHooks, backbone_network, base_network, blocks_of
from shadowtune.serving.vllm.support import check_supported
from shadowtune.serving.vllm.weights import load_base_weights, load_shadow_weights


class ShadowNetwork(nn.Module):
    """Backbone, projections and boundaries of a shadow, named as they are saved.

    The backbone runs in vLLM's dtype; projections and boundaries get the dtype that they were saved in. A shadow whose
    attached model reads no s0 (variant "stateless" without logit interpolation) has boundaries only.
    """

    def __init__(self, vllm_config: VllmConfig, config: ShadowModelConfig, prefix: str) -> None:
        super().__init__()
        assert config.base_config is not None and config.backbone_config is not None
        text, own, settings = (
            config.base_config.get_text_config(decoder=True),
            config.backbone_config,
            config.shadow_config,
        )
        first = settings.first_boundary(text.num_hidden_layers)
        self.boundaries = Boundaries(text.num_hidden_layers - first, text.hidden_size, settings, first).eval()
        self.backbone: nn.Module | None = None
        self.embedding: FrozenEmbedding | None = None
        self.input_projection: nn.Linear | None = None
        self.projection: nn.Linear | None = None
        if not self.boundaries.reads_states:
            return
        self.backbone = backbone_network(vllm_config, own, maybe_prefix(prefix, "backbone"))
        if settings.backbone != "mirror":
            self.embedding = FrozenEmbedding(own)
        if own.hidden_size != text.hidden_size:
            self.projection = nn.Linear(own.hidden_size, text.hidden_size, bias=False)
            if self.embedding is None:
                self.input_projection = nn.Linear(text.hidden_size, own.hidden_size, bias=False)

    def initial_states(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor) -> Tensor | None:
        """Run the backbone; return s0 (T, d), or None where nothing reads it.

        Args:
            input_ids: (T,), needed by a backbone with its own embedding.
            positions: (T,).
            inputs_embeds: (T, d), the base's embeddings. They are copied, since vLLM's models write into their input.
        """
        if self.backbone is None:
            return None
        if self.embedding is not None:
            assert input_ids is not None
            inputs = self.embedding(input_ids)
        elif self.input_projection is not None:
            inputs = self.input_projection(inputs_embeds.to(self.input_projection.weight.dtype))
        else:
            inputs = inputs_embeds.clone()
        states = self.backbone(None, positions, None, inputs.to(inputs_embeds.dtype))
        return states if self.projection is None else self.projection(states.to(self.projection.weight.dtype))


@support_torch_compile
class AttachedNetwork(nn.Module):
    """Base and shadow without the head, which vLLM compiles as one graph."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.base: Any = base_network(vllm_config, config, maybe_prefix(prefix, "base"))
        self.shadow = ShadowNetwork(vllm_config, config, maybe_prefix(prefix, "shadow"))
        self.hooks = BoundaryHooks(self.shadow.boundaries, blocks_of(self.base, config.base_config))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the head reads (T, d), for token ids or embeddings of T tokens of any sequences."""
        embeds = self.base.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        initial = self.shadow.initial_states(input_ids, positions, embeds)
        self.hooks.states = initial
        hidden = self.base(None, positions, intermediate_tensors, embeds)
        self.hooks.states = None
        return self.shadow.boundaries.interpolated(hidden, initial)


class AttachedModel(nn.Module):
    """What the models of both tasks share: the network, and loading it.

    Raises:
        ConfigError: if a setting of vLLM does not fit the shadow.
        UnsupportedArchitectureError: if the plugin, or vLLM, does not run the base's architecture.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: ShadowModelConfig = vllm_config.model_config.hf_config
        check_supported(self.config)
        _check_settings(vllm_config, self.config)
        self.path, self.revision = vllm_config.model_config.model, vllm_config.model_config.revision
        self.network = AttachedNetwork(vllm_config=vllm_config, prefix=prefix)
        base = resolve(self.config.base_name_or_path)
        self.secondary_weights = [DefaultModelLoader.Source(base, self.config.base_revision, prefix="base.")]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the base's embeddings (T, d) of token ids (T,)."""
        return self.network.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the head reads (T, d)."""
        return self.network(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base from ``weights``, the shadow from its directory; return the names of all parameters.

        Raises:
            CheckpointError: if the base has other weights than in training, or the shadow's files are damaged.
        """
        base = ((name.removeprefix("base."), tensor) for name, tensor in weights if name.startswith("base."))
        loaded = {f"network.base.{name}" for name in load_base_weights(self.network.base, self.config, base)}
        tensors = read_tensors(self.path, revision=self.revision)
        drop_unusable_drafts(self.config, tensors, self.path)
        shadow = load_shadow_weights(self.network.shadow, self.config, tensors, self.path)
        self.network.hooks.split()
        return loaded | {f"network.shadow.{name}" for name in shadow} | self.load_head(tensors)

    def load_head(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Load the head from the shadow's tensors; return the names of its parameters."""
        return set()


class AttachedForCausalLM(AttachedModel):
    """The model that vLLM runs for ``architectures: ["ShadowForCausalLM"]``, behind the base's head."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the logits (T, V) of the base's head."""
        return self.network.base.compute_logits(hidden_states)


class AttachedForSequenceClassification(AttachedModel):
    """The model that vLLM runs for ``architectures: ["ShadowForSequenceClassification"]``, with the shadow's head.

    The head reads the last token. vLLM applies softmax, or sigmoid, to the logits of all its classifiers.
    """

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        assert self.config.base_config is not None and self.config.num_labels is not None
        width = self.config.base_config.get_text_config(decoder=True).hidden_size
        self.score = nn.Linear(width, self.config.num_labels, bias=False, dtype=model_config.head_dtype)
        self.pooler = DispatchPooler.for_seq_cls(model_config.pooler_config, classifier=self.score)

    def load_head(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Load the attached model's head from the shadow's tensors; return the names of its parameters."""
        check_tensors({"score": self.score}, {n: t for n, t in tensors.items() if n.startswith("score.")}, self.path)
        self.score.weight.data.copy_(tensors["score.weight"])
        return {"score.weight"}


def _check_settings(vllm_config: VllmConfig, config: ShadowModelConfig) -> None:
    """Raise ConfigError for settings of vLLM that do not fit the shadow."""
    model_config = vllm_config.model_config
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            "a shadow runs beside all blocks of its base: use --tensor-parallel-size, not pipeline stages"
        )
    if model_config.quantization is not None:
        raise ConfigError(
            f"--quantization {model_config.quantization} would change the base that the shadow was trained beside"
        )
    positions = vars(config).get("max_position_embeddings")  # None where the architecture has no limit
    if positions is not None and model_config.max_model_len > positions:
        raise ConfigError(
            f"base and shadow have {positions} positions, vLLM was given {model_config.max_model_len}: "
            f"pass --max-model-len {positions}"
        )
    if model_config.enable_prompt_embeds and config.shadow_config.backbone != "mirror":
        raise ConfigError("this shadow's backbone has its own token embedding: leave out --enable-prompt-embeds")
