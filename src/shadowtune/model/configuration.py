"""``config.json`` of a shadow: the method's settings, the configs of base and backbone, and how the shadow started."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from shadowtune.compatibility import CACHE_NAMES
from shadowtune.config.settings import from_mapping
from shadowtune.config.shadow import SCHEMA_VERSION, ShadowConfig
from shadowtune.errors import CheckpointError

LIBRARY = "shadowtune: pip install shadowtune, and import shadowtune before loading"
"""A field of ``config.json``, for people who open a shadow without this package: transformers does not know it."""
ProjectionStart = Literal["none", "random", "selection", "least_squares", "copied"]


@dataclass(frozen=True)
class Initialization:
    """How a shadow's backbone and projections were initialized; for people, loading does not need it."""

    kind: Literal["random", "base_layers", "pretrained", "detached"]
    """Source of the weights."""
    source: str | None = None
    """The model or directory, of "pretrained" and "detached"."""
    layers: tuple[int, ...] | None = None
    """Blocks of the base that were copied, counted from 0, of "base_layers"."""
    projection: ProjectionStart = "none"
    """Initial value of Proj of Eq. 1; "selection" maps kept channels back to their indices."""
    projection_error: float | None = None
    """||W_head W_proj - W_small||_F / ||W_small||_F: distance of the base's head behind the projection from the
    pretrained model's own head. 0 is exact, 1 no better than a projection of zeros."""

    def __str__(self) -> str:
        """Return a phrase that follows "the shadow starts"."""
        words = {
            "random": "at random",
            "base_layers": f"as copies of base blocks {', '.join(map(str, self.layers or ()))}",
            "pretrained": f"from the pretrained model {self.source}",
            "detached": f"from the earlier shadow {self.source}",
        }[self.kind]
        if self.projection != "none":
            words += f", projection: {self.projection.replace('_', ' ')}"
        if self.projection_error is not None:
            words += f", relative error of the head {self.projection_error:.2g}"
        return words


class ShadowModelConfig(PreTrainedConfig):
    """Config of an attached model, ``model_type: shadow``.

    ``get_text_config()`` describes the blocks of both networks, so every cache that transformers makes for this config
    has a layer per block of the shadow backbone, then one per block of the base.
    """

    model_type = "shadow"
    sub_configs = {"base_config": AutoConfig, "backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        "base_loss",
        "shadow_loss",
        "distillation_loss",
        "matching_loss",
        "draft_loss",
        "draft_features",
        "last_hidden_state",
    ]
    """Fields of the models' outputs that are not predictions, for ``Trainer.predict`` and ``compute_metrics``."""
    has_no_defaults_at_init = True

    def __init__(
        self,
        shadow: dict[str, Any] | None = None,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_name_or_path: str = "",
        base_revision: str | None = None,
        base_fingerprint: str | None = None,
        base_signature: dict[str, Any] | None = None,
        initialization: dict[str, Any] | None = None,
        draft_vocabulary_size: int | None = None,
        schema_version: int = SCHEMA_VERSION,
        **kwargs: Any,
    ) -> None:
        if schema_version > SCHEMA_VERSION:
            raise CheckpointError(
                f"config.json has schema_version {schema_version}, this shadowtune reads up to {SCHEMA_VERSION}; "
                "update shadowtune"
            )
        self.schema_version = schema_version
        self.shadow = ShadowConfig.from_dict(shadow or {}).to_dict()
        self.base_config = _as_config(base_config)
        self.backbone_config = _as_config(backbone_config)
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_signature = base_signature
        self.initialization = initialization
        self.draft_vocabulary_size = draft_vocabulary_size
        if self.base_config is not None:
            text = self.base_config.get_text_config(decoder=True)
            for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"):
                kwargs.setdefault(name, getattr(text, name))
            positions = [_positions(text), _positions(self.backbone_config)]
            if any(positions):
                kwargs.setdefault("max_position_embeddings", min(number for number in positions if number))
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "use_cache"):
                kwargs.setdefault(name, getattr(text, name, None))
            for name in ("id2label", "label2id", "problem_type"):
                kwargs.setdefault(name, getattr(self.base_config, name))
        self.library = kwargs.pop("library", LIBRARY)
        super().__init__(**kwargs)

    @property
    def shadow_config(self) -> ShadowConfig:
        """The method's settings."""
        return ShadowConfig.from_dict(self.shadow)

    @property
    def start(self) -> Initialization | None:
        """How the shadow was initialized; None for one that was saved before this was recorded."""
        if self.initialization is None:
            return None
        return from_mapping(Initialization, self.initialization, where="initialization")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return a copy of the base's text config with the shadow backbone's layers before the base's."""
        if self.base_config is None or self.backbone_config is None:
            return self
        base = self.base_config.get_text_config(decoder=True)
        backbone = self.backbone_config.get_text_config(decoder=True)
        both = copy.deepcopy(base)
        types = [*_cache_types(backbone), *get_layer_types_and_kwargs(base)[0]]
        both.num_hidden_layers = len(types)
        both.layer_types = types
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(both, name, getattr(self, name))
        return both


def _positions(config: PreTrainedConfig | None) -> int | None:
    """Return how many positions a network has; None if its config names no limit."""
    if config is None:
        return None
    number = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return number if isinstance(number, int) else None


def _cache_types(backbone: PreTrainedConfig) -> list[str]:
    """Return the kinds of the backbone's cache layers; sliding windows store all tokens, as the base may."""
    types = get_layer_types_and_kwargs(backbone)[0]
    return ["full_attention" if "sliding" in kind or "chunked" in kind else kind for kind in types]


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if isinstance(config, dict):
        values = dict(config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return copy.deepcopy(config)  # transformers writes into the configs of a model it builds; the caller's stay clean
