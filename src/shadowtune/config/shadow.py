"""The settings of a shadow network (ShadowPEFT, https://arxiv.org/abs/2604.19254).

Symbols: base of L blocks and width d; shadow backbone of L_s blocks and width d_s; rank r; update width k.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from shadowtune.config.checking import check_choices, check_range, from_mapping

SCHEMA_VERSION = 1
"""Version of the settings as stored in an adapter's ``config.json``."""


@dataclass(frozen=True)
class ShadowConfig:
    """Everything that shapes a shadow. The defaults are the paper's variant.

    Raises:
        ConfigError: if a value is outside its range; the message lists every fault at once.
    """

    rank: int = 16
    """r, width of the injection's bottleneck (Eq. 3). At least 1."""
    update_width: int = 8
    """k, hidden width of the update's transform and gate (Eq. 5-6). At least 1."""
    alpha: float = 0.1
    """Scale of the injection (Eq. 4). Not negative."""
    dropout: float = 0.2
    """Probability in [0, 1) of dropping an entry of the injection's bottleneck and of the transform."""
    shadow_loss_weight: float = 0.05
    """lambda of Eq. 8: the weight of the detached shadow's own loss in training. 0 leaves the shadow unsupervised."""

    backbone: str = "mirror"
    """"mirror" builds a small copy of the base's architecture; anything else is the path or Hub id of a
    pretrained causal language model with the base's vocabulary."""
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
    init_std: float = 0.02
    """Standard deviation of W_down at the start; W_up starts at 0, so the attached model equals the base."""

    def __post_init__(self) -> None:
        """Check every range and report all faults together."""
        check_range(
            self,
            rank=(1, None),
            update_width=(1, None),
            alpha=(0, None),
            shadow_loss_weight=(0, None),
            num_shadow_layers=(1, None),
            init_std=(0, None),
            hidden_size=(1, None),
            intermediate_size=(1, None),
            num_attention_heads=(1, None),
            num_key_value_heads=(1, None),
            head_dim=(1, None),
            dropout=(0, 1),
        )
        check_choices(
            self, depth_sharing=("backbone", "full"), activation=("silu", "gelu"), dropout_position=("rank", "hidden")
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShadowConfig":
        """Build from a mapping such as a part of ``config.json``; unknown keys and wrong types are errors."""
        return from_mapping(cls, values, where="shadow")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, ready for JSON."""
        return asdict(self)
