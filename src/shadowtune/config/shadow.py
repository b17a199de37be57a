"""Settings of a shadow network (ShadowPEFT, https://arxiv.org/abs/2604.19254) and of speculative decoding with it.

Symbols: base of L blocks and width d; shadow backbone of L_s blocks and width d_s; rank r; update width k.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import StrictBool, StrictInt

from shadowtune.config.settings import (
    NUMBER,
    Fraction,
    NonNegativeFloat,
    PositiveInt,
    current_names,
    from_mapping,
    raise_errors,
    settings,
)
from shadowtune.errors import ConfigError

SCHEMA_VERSION = 1
"""Version of the settings as stored in an adapter's ``config.json``."""

RECOMMENDED_SHADOW: Mapping[str, Any] = MappingProxyType(
    {
        "variant": "stateless",
        "rank": 32,
        "alpha": 0.5,
        "dropout": 0.0,
        "inject_first": True,
        "channel_scaling": True,
        "init_layers": (0,),
        "shadow_loss_weight": 1.0,
    }
)
"""The settings of ``ShadowConfig.recommended()``."""

PEFT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "r": "rank",
        "update_hidden_size": "update_width",
        "shadow_alpha": "alpha",
        "shadow_dropout": "dropout",
        "auxiliary_loss_weight": "shadow_loss_weight",
        "shadow_model": "backbone",
        "shadow_num_hidden_layers": "num_shadow_layers",
        "shadow_hidden_size": "hidden_size",
        "shadow_intermediate_size": "intermediate_size",
        "shadow_num_attention_heads": "num_attention_heads",
    }
)
"""Names in ``peft.ShadowConfig`` of settings that mean the same."""
PEFT_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"r": 8, "shadow_alpha": 0.1, "shadow_dropout": 0.2, "auxiliary_loss_weight": 0.05, "shadow_model": "mirror"}
)
PEFT_COMPUTES: Mapping[str, Any] = MappingProxyType(
    {
        "update": True,
        "depth_sharing": "backbone",
        "update_norm": False,
        "update_bias": True,
        "activation": "gelu",
        "inject_first": True,
        "injection_start": 0.0,
        "injection_after": None,
        "logit_interpolation": None,
        "variant": "paper",
    }
)
"""The settings that the Shadow tuner of Hugging Face PEFT implements."""
PEFT_DROPOUT: Mapping[str, Any] = MappingProxyType({"transform_dropout": False, "dropout_position": "hidden"})
"""Its dropout settings; they matter in training alone."""


@settings
class ShadowConfig:
    """Architecture, initialization and loss weights of a shadow.

    The defaults are the paper's variant; ``recommended()`` returns the variant that we advise.

    Raises:
        ConfigError: if a value is outside its range, or settings contradict each other; the message lists all errors.
    """

    variant: Literal["paper", "stateless"] = "paper"
    """Computation at a boundary. "paper": Eq. 2-7, from the hidden state h and the shadow state s. "stateless": a
    correction of h computed from h alone, each token normalized, scaled such that an optimizer step changes h equally
    for every rank, width and depth (``core/stateless.py``). The attached model then needs the shadow's backbone only
    for ``logit_interpolation``, the shadow's loss terms and drafts, and does not run it otherwise. Of the settings of a
    boundary, "stateless" uses ``rank``, ``alpha``, ``dropout``, ``dropout_position``, ``depth_sharing``,
    ``inject_first``, ``injection_start``, ``injection_after`` and ``channel_scaling``."""
    rank: PositiveInt = 16
    """r, width of the injection's bottleneck (Eq. 3)."""
    update_width: PositiveInt = 8
    """k, hidden width of the update's transform and gate (Eq. 5-6)."""
    alpha: NonNegativeFloat = 0.1
    """Scale of the injection (Eq. 4). In the variant "stateless" its unit is the usual magnitude of a block's input,
    and 0.5 is a good value."""
    dropout: Fraction = 0.2
    """Dropout probability in the injection's bottleneck and in the transform."""
    shadow_loss_weight: NonNegativeFloat = 0.05
    """lambda of Eq. 8: weight of the detached shadow's own loss in training. 0 trains the shadow without it."""
    shadow_loss_weight_end: NonNegativeFloat | None = None
    """Final value of lambda, reached linearly over the training steps; None keeps lambda constant."""
    distillation_weight: NonNegativeFloat = 0.0
    """mu: weight of tau^2 KL(attached || detached) at labelled positions. The gradient reaches the detached shadow
    only."""
    distillation_temperature: Annotated[float, Ge(0.01), NUMBER] = 1.0
    """tau. At 1 the divergence reuses the logits of the losses; other values compute both networks' logits again."""
    distillation_top_k: PositiveInt | None = None
    """k: restrict the divergence to the teacher's k most likely tokens, whose probabilities are renormalized. None uses
    the whole vocabulary, and is the only choice for classifiers."""
    matching_weight: NonNegativeFloat = 0.0
    """nu: weight of |s0 - h|^2 / |h|^2 at labelled positions, which pulls s0 towards the attached model's last hidden
    state h, the input of the head that both share."""

    backbone_loss: Literal["joint", "own"] = "joint"
    """Losses that train the backbone and its projections. "joint": the whole joint loss (the paper). "own": only the
    shadow's own terms (lambda, mu, nu); the gradient of the attached model's loss stops at s0."""

    backbone: str = "mirror"
    """"mirror" builds a small copy of the base's architecture; anything else is the path or Hub id of a pretrained
    causal language model with the base's vocabulary. If its width differs, its projection is initialized by least
    squares, such that the base's head after it reproduces the pretrained model's own logits as closely as possible."""
    init_layers: tuple[StrictInt, ...] | None = None
    """Blocks of the base (-1 is the last) whose weights initialize the blocks of a mirrored backbone, with all their
    experts if they have any. Their number sets ``num_shadow_layers``. Smaller sizes below keep the strongest channels,
    heads and units of the copies. None initializes the mirror at random (the paper)."""
    init_from: str | None = None
    """Directory of an earlier shadow whose backbone and projections initialize this one: saved by ``save_pretrained``,
    or detached without a projection. Boundaries are initialized anew. None initializes at random, or by
    ``init_layers``."""
    num_shadow_layers: PositiveInt = 1
    """L_s, blocks of a mirrored backbone. Ignored for a pretrained one."""
    hidden_size: PositiveInt | None = None
    """d_s of a mirrored backbone; None means d, and then no projection is needed (Eq. 1)."""
    intermediate_size: PositiveInt | None = None
    """MLP width of a mirrored backbone; None means the base's."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads of a mirrored backbone; None means the base's."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads of a mirrored backbone; None means the base's."""
    head_dim: PositiveInt | None = None
    """Width of one attention head of a mirrored backbone; None means the base's."""

    draft_rank: PositiveInt | None = None
    """Bottleneck width of a draft head, which drafts from s0 and from the attached model's hidden state one token
    earlier (speculative decoding). Its own loss trains it and changes neither network; None builds none."""
    draft_layers: tuple[StrictInt, ...] | None = None
    """Blocks of the base, from 1 to the last (-1), whose inputs the draft head reads as well, of the last token before
    the draft: a low, a middle and a high one, such as [4, 15, -1] of 30. The head is then a gated one. None reads none,
    as draft heads of earlier releases do."""
    draft_steps: PositiveInt = 3
    """Proposals in a row, each from the one before, that the draft head's loss runs through, as in decoding."""
    update: StrictBool = True
    """False disables Eq. 5-7: every block gets the initial state s0 (the paper's ablation)."""
    depth_sharing: Literal["backbone", "full"] = "backbone"
    """"backbone": each boundary has its own W, T and G (the paper). "full": all boundaries share one W, T and G, with a
    learned scale for each boundary."""
    update_norm: StrictBool = True
    """Apply a LayerNorm, shared by all boundaries, before T and G (Fig. 2 of the paper)."""
    update_bias: StrictBool = False
    """Give T and G biases (as the Shadow tuner of Hugging Face PEFT does)."""
    activation: Literal["silu", "gelu"] = "silu"
    """Activation inside T and G."""
    transform_dropout: StrictBool = True
    """Apply dropout to the hidden layer of T too."""
    inject_first: StrictBool = False
    """Inject before the first block as well (as the Shadow tuner of Hugging Face PEFT does)."""
    injection_start: Fraction = 0.0
    """Share of the base's blocks, from the first on, that get no injection and run as in the base. No gradient reaches
    them and training keeps none of their activations; in serving their keys and values are the same for every adapter.
    0 injects from the block on that ``inject_first`` names."""
    injection_after: tuple[StrictInt, ...] | None = None
    """Token ids that end the prompt which all adapters share, such as those that close the system message. A sequence
    runs as in the bare base up to the first occurrence of these ids in a row, they included, and gets injections behind
    it; without an occurrence it gets them from its first token on. The keys and values of the shared prompt are then
    the base's in every block, and serving computes them once for all adapters. None injects into every token."""
    dropout_position: Literal["rank", "hidden"] = "rank"
    """Dropout after W_down, on r numbers (Eq. 3), or before it, on d numbers."""
    channel_scaling: StrictBool = False
    """Divide each channel of h - s, before W_down, by its usual magnitude in the base. A few channels of a trained base
    are ten to fifty times as large as the others in every token and would dominate W_down. Measured once, at
    initialization, on random tokens; folded into W_down afterwards."""
    logit_interpolation: NonNegativeFloat | None = None
    """gamma: outside of training the head gets h_L + gamma s0 in place of h_L, so the attached model's logits are its
    own plus gamma times the shadow's, a product of experts (Hinton, 2002, https://doi.org/10.1162/089976602760128018),
    at the cost of one vector addition. In training the two are learned separately: beside a shadow that has memorized
    the training examples, the boundaries would get no gradient. None disables it (the paper)."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of W_down at initialization; W_up starts at 0, so the attached model equals the base."""

    def __post_init__(self) -> None:
        """Check what contradicts each other; set the number of blocks of ``init_layers``."""
        raise_errors(self._conflicts())
        if self.init_layers is not None:
            object.__setattr__(self, "num_shadow_layers", len(self.init_layers))

    def _conflicts(self) -> Iterator[str]:
        own = (self.shadow_loss_weight, self.shadow_loss_weight_end, self.distillation_weight, self.matching_weight)
        if self.backbone_loss == "own" and not any(own):
            yield (
                "backbone_loss own leaves the backbone nothing to learn from where shadow_loss_weight, "
                "distillation_weight and matching_weight are 0; set one of them, or backbone_loss joint"
            )
        if self.injection_after is not None and (not self.injection_after or min(self.injection_after) < 0):
            yield (
                f"injection_after must be one or more token ids, got {list(self.injection_after)}; leave it out to "
                "inject into every token"
            )
        if self.draft_layers is not None and self.draft_rank is None:
            yield (
                f"draft_layers {list(self.draft_layers)} is read by a draft head, but draft_rank builds none; set "
                "draft_rank, such as 64, or leave draft_layers out"
            )
        if self.init_layers is None:
            return
        layers = list(self.init_layers)
        if not layers:
            yield "init_layers must name a block of the base at least, got none; init_layers=None starts at random"
        if self.backbone != "mirror":
            yield (
                f"init_layers {layers} copies blocks of the base into a mirror, but backbone is {self.backbone!r}; "
                "leave one of the two out"
            )
        if self.init_from is not None:
            yield (
                f"init_layers {layers} and init_from {self.init_from!r} both say how the backbone starts; "
                "leave one of the two out"
            )
        if self.num_shadow_layers not in (1, len(layers)):
            yield (
                f"num_shadow_layers {self.num_shadow_layers} is not the number of init_layers {layers}; leave it out"
            )

    def first_boundary(self, blocks: int) -> int:
        """Return the index of the first of a base's ``blocks`` blocks that a boundary precedes; at most the last."""
        start = min(round(self.injection_start * blocks), blocks - 1)
        return max(start, 0 if self.inject_first else 1)

    @classmethod
    def recommended(cls, **changes: Any) -> "ShadowConfig":
        """Return the settings that we advise in place of the paper's: one recipe for all tasks (docs/method.md).

        The shadow's own loss has weight 1, for a loop that trains both networks at once. ``preset: recommended`` of a
        training file instead trains the shadow in a stage of its own first, and then leaves its loss out.

        Args:
            **changes: fields that replace the recipe's.
        """
        return cls(**{**recommended_shadow(changes), **changes})

    @classmethod
    def from_peft(cls, config: Any) -> "ShadowConfig":
        """Return the settings with which this package computes what a ``peft.ShadowConfig`` describes.

        Args:
            config: a ``peft.ShadowConfig``, or its values as a mapping.

        Raises:
            ConfigError: if it is of another method, adapts chosen blocks only, trains modules of the base, or has
                embeddings of its own.
        """
        given = config if isinstance(config, Mapping) else config.to_dict()
        if given.get("peft_type", "SHADOW") != "SHADOW":
            raise ConfigError(
                f"peft_type {given['peft_type']!s} is another method; pass a ShadowConfig of PEFT or of ours"
            )
        values = {**PEFT_DEFAULTS, **given}
        absent = dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"))
        for name, expected in {**absent, "share_embeddings": True}.items():
            if values.get(name, expected) != expected:
                raise ConfigError(
                    f"{name}={values[name]!r} of PEFT's ShadowConfig has no counterpart here; leave it out"
                )
        values["update_hidden_size"] = values.get("update_hidden_size") or values["r"]
        values["shadow_num_hidden_layers"] = values.get("shadow_num_hidden_layers") or 1
        named = {ours: values.get(theirs) for theirs, ours in PEFT_NAMES.items()}
        return cls.from_dict({**named, **PEFT_COMPUTES, **PEFT_DROPOUT})

    def to_peft(self) -> dict[str, Any]:
        """Return the keywords of the ``peft.ShadowConfig`` that computes the same: ``peft.ShadowConfig(**...)``.

        Raises:
            ConfigError: naming every setting that PEFT's tuner computes otherwise.
        """
        values = self.to_dict()
        fixed = {**PEFT_COMPUTES, **PEFT_DROPOUT, "num_key_value_heads": None, "head_dim": None}
        fixed |= {"init_layers": None, "init_from": None, "draft_rank": None, "channel_scaling": False}
        fixed |= {"distillation_weight": 0.0, "matching_weight": 0.0, "shadow_loss_weight_end": None}
        other = [
            f"{name}={values[name]!r} (it has {value!r})" for name, value in fixed.items() if values[name] != value
        ]
        if other:
            raise ConfigError(f"the Shadow tuner of PEFT computes otherwise: {'; '.join(other)}")
        return {theirs: values[ours] for theirs, ours in PEFT_NAMES.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShadowConfig":
        """Build from a mapping such as a part of ``config.json``, also of an older release.

        Raises:
            ConfigError: on unknown keys, wrong types and values out of range.
        """
        return from_mapping(cls, current_names(values, warn=False), where="shadow")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, ready for JSON."""
        return asdict(self)


def recommended_shadow(values: Mapping[str, Any], whole_base: bool = True) -> dict[str, Any]:
    """Return the recommended settings without those that contradict given ones.

    Args:
        values: the settings of ``ShadowConfig`` that are given.
        whole_base: whether the base's weights can be copied, being neither quantized nor missing.
    """
    recipe = dict(RECOMMENDED_SHADOW)
    elsewhere = values.get("backbone", "mirror") != "mirror" or values.get("init_from") is not None
    if elsewhere or not whole_base or values.get("num_shadow_layers", 1) != 1:
        del recipe["init_layers"]
    return recipe


DrafterName = Literal["shadow", "draft_head", "ngram", "combined"]
_DraftLength = Annotated[StrictInt, Ge(1), Lt(65)]


@settings
class SpeculationConfig:
    """Settings of speculative decoding (``generate(speculate=...)``): the shadow drafts, one attached pass verifies.

    None of them changes the output of greedy decoding, or the distribution of samples.
    """

    length: _DraftLength | None = None
    """Tokens drafted before each verification; None adapts the number, 0 included, to the acceptance so far."""
    drafter: DrafterName = "combined"
    """Source of the drafts. "shadow": the detached shadow. "draft_head": the draft head, if one was trained
    (``draft_rank``). "ngram": the tokens that followed the same n-gram earlier in the text. "combined": ngram where its
    estimated acceptance is higher than that of draft_head, or of the shadow without a draft head."""
    max_length: _DraftLength = 8
    """Most tokens drafted if the number is adapted."""
    branches: Annotated[StrictInt, Ge(1), Lt(9)] = 1
    """Tokens tried at each position. Beside the drafted token its next likely ones are verified in the same pass, as
    leaves of a tree; 1 is a chain. ``generate`` needs attention that takes a tree as mask ("sdpa", "eager") and a cache
    without windows or a fixed size, else it drafts a chain, as the server always does."""
    draft_vocabulary: StrictBool = True
    """Draft only tokens that are frequent in the training data, if the shadow was saved with a list of them."""

    @property
    def longest(self) -> int:
        """Most tokens drafted at once."""
        return self.max_length if self.length is None else self.length

    @classmethod
    def of(cls, speculate: "bool | int | str | SpeculationConfig") -> "SpeculationConfig | None":
        """Convert an argument ``speculate``: True or "auto", a number of tokens, settings; None for False and 0.

        Raises:
            ConfigError: if it is none of these.
        """
        if isinstance(speculate, SpeculationConfig):
            return speculate
        if speculate is True or speculate == "auto":
            return cls()
        if speculate is False or speculate == 0:
            return None
        if isinstance(speculate, int):
            return cls(length=speculate)
        raise ConfigError(f'speculate must be True, False, "auto" or a number of tokens, got {speculate!r}')
