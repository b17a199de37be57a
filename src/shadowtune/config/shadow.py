"""The settings of a shadow network (ShadowPEFT, https://arxiv.org/abs/2604.19254).

Symbols: base of L blocks and width d; shadow backbone of L_s blocks and width d_s; rank r; update width k.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from shadowtune.config.checking import check_choices, check_range, from_mapping
from shadowtune.config.presets import recommended_shadow
from shadowtune.errors import ConfigError

SCHEMA_VERSION = 1
"""Version of the settings as stored in an adapter's ``config.json``."""


@dataclass(frozen=True)
class ShadowConfig:
    """Everything that shapes a shadow. The defaults are the paper's variant; ``recommended()`` is what we advise.

    Raises:
        ConfigError: if a value is outside its range; the message lists every fault at once.
    """

    variant: Literal["paper", "stateless"] = "paper"
    """What a boundary computes. "paper": Eq. 2-7, from h and the shadow state s. "stateless": a correction of h that
    reads h alone, each token normalized, with a scale by which an optimizer step moves h alike for every rank, width
    and depth (``core/stateless.py``). The attached model then needs the shadow's backbone for ``head_mixing``, the
    shadow's loss terms and drafts only, and does not run it otherwise. Of the settings of a boundary it knows ``rank``,
    ``alpha``, ``dropout``, ``dropout_position``, ``depth_sharing``, ``inject_first`` and ``channel_scaling``."""
    rank: int = 16
    """r, width of the injection's bottleneck (Eq. 3). At least 1."""
    update_width: int = 8
    """k, hidden width of the update's transform and gate (Eq. 5-6). At least 1."""
    alpha: float = 0.1
    """Scale of the injection (Eq. 4). Not negative. In the variant "stateless" it is in units of the usual size of a
    block's input, and 0.5 is a good value."""
    dropout: float = 0.2
    """Probability in [0, 1) of dropping an entry of the injection's bottleneck and of the transform."""
    shadow_loss_weight: float = 0.05
    """lambda of Eq. 8: the weight of the detached shadow's own loss in training. 0 leaves the shadow unsupervised."""
    shadow_loss_weight_end: float | None = None
    """Where lambda moves to, linearly over the training steps; None leaves it where it is."""
    distillation_weight: float = 0.0
    """mu: the weight of tau^2 KL(attached || detached) at labelled positions, by which the detached shadow learns from
    the attached model, whose own gradient it leaves alone."""
    distillation_temperature: float = 1.0
    """tau, above 0. At 1 the divergence takes no product with the vocabulary of its own; others take as many again."""
    distillation_top_k: int | None = None
    """k: the divergence looks only at the teacher's k most likely tokens, whose probabilities are made to sum to 1
    again. None looks at the whole vocabulary, and is all that classifiers can do."""
    matching_weight: float = 0.0
    """nu: the weight of |s0 - h|^2 / |h|^2 at labelled positions, which draws s0 to the attached model's last hidden
    state h, in front of the head that both share."""

    backbone_loss: Literal["joint", "own"] = "joint"
    """"joint": the whole joint loss trains the backbone and its projections (the paper). "own": only the shadow's own
    terms do (lambda, mu, nu); the attached model's loss stops at s0, and its boundaries learn to use the s0 that they
    get."""

    backbone: str = "mirror"
    """"mirror" builds a small copy of the base's architecture; anything else is the path or Hub id of a
    pretrained causal language model with the base's vocabulary. Where its width differs, its projection starts by least
    squares, so that the base's head behind it gives the model's own logits as nearly as can be."""
    init_layers: tuple[int, ...] | None = None
    """Blocks of the base, -1 being the last, that the blocks of a mirrored backbone start as copies of, with all their
    experts if they have any. They set ``num_shadow_layers``. Smaller sizes below keep the copies' strongest channels,
    heads and units. None starts the mirror at random (the paper)."""
    init_from: str | None = None
    """Directory of an earlier shadow whose backbone and projections this one starts with: saved by ``save_pretrained``,
    or detached without a projection. Boundaries start anew. None starts at random, or from ``init_layers``."""
    num_shadow_layers: int = 1
    """L_s, blocks of a mirrored backbone. Ignored for a pretrained one."""
    hidden_size: int | None = None
    """d_s of a mirrored backbone; None means d, and then no projection is needed (Eq. 1)."""
    intermediate_size: int | None = None
    """MLP width of a mirrored backbone; None means the base's."""
    num_attention_heads: int | None = None
    """Attention heads of a mirrored backbone; None means the base's."""
    num_key_value_heads: int | None = None
    """Key and value heads of a mirrored backbone; None means the base's."""
    head_dim: int | None = None
    """Width of one attention head of a mirrored backbone; None means the base's."""

    draft_rank: int | None = None
    """Width of a bottleneck by which a drafter sees, beside s0, what the attached model knew one token earlier
    (speculative decoding). Trained along by a loss of its own, which changes neither network; None leaves it out."""
    update: bool = True
    """False switches Eq. 5-7 off: every block sees the initial state s0 (the paper's ablation)."""
    depth_sharing: Literal["backbone", "full"] = "backbone"
    """"backbone": W, T and G of each boundary are its own (the paper). "full": one W, T and G serve all boundaries,
    with a learned scale for each."""
    update_norm: bool = True
    """Whether a LayerNorm, one for all boundaries, stands before T and G (Fig. 2 of the paper)."""
    update_bias: bool = False
    """Whether T and G have biases (the Shadow tuner of Hugging Face PEFT has)."""
    activation: Literal["silu", "gelu"] = "silu"
    """Activation inside T and G."""
    transform_dropout: bool = True
    """Whether the hidden layer of T is dropped out too."""
    inject_first: bool = False
    """Whether the first block receives an injection as well (the Shadow tuner of Hugging Face PEFT does)."""
    dropout_position: Literal["rank", "hidden"] = "rank"
    """Dropout after W_down, on r numbers (Eq. 3), or before it, on d numbers."""
    channel_scaling: bool = False
    """Whether each channel of h - s is divided, before W_down, by how large it usually is in the base. A few channels
    of a trained base are ten to fifty times as large as the others in every token, and drown what the others could
    teach W_down. Measured once, where the shadow starts, on random tokens; used as a part of W_down."""
    head_mixing: float | None = None
    """gamma: outside of training the head sees h_L + gamma s0 in place of h_L, so that the attached model's logits are
    its own plus gamma times the shadow's, a product of experts (Hinton, 2002,
    https://doi.org/10.1162/089976602760128018) at the price of one vector. In training each of the two learns for
    itself: beside a shadow that knows the training rows by heart the boundaries would have nothing left to learn. None
    leaves it out (the paper)."""
    init_std: float = 0.02
    """Standard deviation of W_down at the start; W_up starts at 0, so the attached model equals the base."""

    def __post_init__(self) -> None:
        """Check every range and report all faults together."""
        check_range(
            self,
            rank=(1, None),
            draft_rank=(1, None),
            update_width=(1, None),
            alpha=(0, None),
            shadow_loss_weight=(0, None),
            shadow_loss_weight_end=(0, None),
            distillation_weight=(0, None),
            distillation_temperature=(0.01, None),
            distillation_top_k=(1, None),
            matching_weight=(0, None),
            num_shadow_layers=(1, None),
            init_std=(0, None),
            head_mixing=(0, None),
            hidden_size=(1, None),
            intermediate_size=(1, None),
            num_attention_heads=(1, None),
            num_key_value_heads=(1, None),
            head_dim=(1, None),
            dropout=(0, 1),
        )
        check_choices(
            self,
            variant=("paper", "stateless"),
            depth_sharing=("backbone", "full"),
            activation=("silu", "gelu"),
            dropout_position=("rank", "hidden"),
            backbone_loss=("joint", "own"),
        )
        own = (self.shadow_loss_weight, self.shadow_loss_weight_end, self.distillation_weight, self.matching_weight)
        if self.backbone_loss == "own" and not any(own):
            raise ConfigError(
                "backbone_loss own leaves the backbone nothing to learn from where shadow_loss_weight, "
                "distillation_weight and matching_weight are 0; set one of them, or backbone_loss joint"
            )
        if self.init_layers is not None:
            self._check_init_layers(tuple(self.init_layers))

    def _check_init_layers(self, layers: tuple[int, ...]) -> None:
        """Refuse what contradicts ``init_layers``, and let their number be that of the shadow's blocks."""
        faults = []
        if not layers:
            faults.append(
                "init_layers must name a block of the base at least, got none; leave it out to start at random"
            )
        if self.backbone != "mirror":
            faults.append(
                f"init_layers {list(layers)} copies blocks of the base into a mirror, but backbone is "
                f"{self.backbone!r}; leave one of the two out"
            )
        if self.init_from is not None:
            faults.append(
                f"init_layers {list(layers)} and init_from {self.init_from!r} both say how the backbone starts; "
                "leave one of the two out"
            )
        if self.num_shadow_layers not in (1, len(layers)):
            faults.append(
                f"num_shadow_layers {self.num_shadow_layers} is not the number of init_layers {list(layers)}; "
                "leave it out"
            )
        if faults:
            raise ConfigError("; ".join(faults))
        object.__setattr__(self, "init_layers", layers)
        object.__setattr__(self, "num_shadow_layers", len(layers))

    @classmethod
    def recommended(cls, **changes: Any) -> "ShadowConfig":
        """Return what we advise in place of the paper's settings: one recipe for all tasks (docs/method.md).

        The shadow's own loss has weight 1, for a loop that trains both networks at once. ``preset: recommended`` of a
        training file trains the shadow alone first and then leaves it out.

        Args:
            **changes: fields that replace the recipe's.
        """
        return cls(**{**recommended_shadow(changes), **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShadowConfig":
        """Build from a mapping such as a part of ``config.json``; unknown keys and wrong types are errors."""
        return from_mapping(cls, values, where="shadow")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, ready for JSON."""
        return asdict(self)
