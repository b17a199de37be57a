"""Ours and what a user would take instead, each as its own users build it.

Defaults are each package's or paper's own: LoRA and DoRA on all linear layers with dropout 0.05 and alpha 32, the
shadows with rank 16, update width 8, dropout 0.2 and the auxiliary loss. One size of each is free: by it budgets are
made equal.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.benchmark.bench import check_known
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import LoraConfig
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.budget import Growth, count_parameters, equal_sizes, growth_of
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.methods import make_trainable

INSTALL = "pip install 'shadowtune[bench]'"
RANK, UPDATE_WIDTH = 16, 8
WAY_OUT = "pass another --parameters or leave the peer out of --peers"
"""What helps where budgets cannot be made equal."""


@dataclass(frozen=True)
class Contender:
    """A way to adapt a base."""

    build: Callable[[PreTrainedModel, int | None], nn.Module]
    """(frozen base, size) -> model to train; for ours, size None means the default."""
    size_name: str | None
    """What is free, for instance ``rank``; None if nothing is trained."""
    step: int = 1
    """The size is a multiple of this."""
    package: str | None = None
    """What has to be installed, as it is imported."""

    def describe(self, size: int | None) -> str | None:
        """Word a size for the rows, for instance ``rank 15``."""
        return None if size is None else f"{self.size_name} {size}"


def shadow_contender(rank: int) -> Contender:
    """Ours with an injection of this rank."""

    def build(base: PreTrainedModel, size: int | None) -> nn.Module:
        config = ShadowConfig(rank=rank, update_width=UPDATE_WIDTH, intermediate_size=size)
        return make_trainable(base, "shadow", shadow=config)

    return Contender(build, "intermediate_size", step=8)


def _recommended(base: PreTrainedModel, size: int | None) -> nn.Module:
    """As in the joint stage: the shadow has learned alone before, and rests."""
    assert size is not None
    config = ShadowConfig.recommended(rank=size, init_layers=None, shadow_loss_weight=0.0)
    model = cast(ShadowForCausalLM, make_trainable(base, "shadow", shadow=config))
    model.freeze_unused()
    return model


def _lora(base: PreTrainedModel, size: int | None) -> nn.Module:
    assert size is not None
    return make_trainable(base, "lora", lora=LoraConfig(rank=size))


def _dora(base: PreTrainedModel, size: int | None) -> nn.Module:
    assert size is not None
    return make_trainable(base, "dora", lora=LoraConfig(rank=size))


def _peft_shadow(base: PreTrainedModel, size: int | None) -> nn.Module:
    try:
        from peft import ShadowConfig as PeftShadowConfig
        from peft import get_peft_model
    except ImportError:
        raise ShadowtuneError(f"peer peft-shadow needs peft 0.21 or later: {INSTALL}") from None
    config = PeftShadowConfig(
        task_type="CAUSAL_LM", r=RANK, update_hidden_size=UPDATE_WIDTH, shadow_intermediate_size=size
    )
    return get_peft_model(base, config)


def _shadow_peft(base: PreTrainedModel, size: int | None) -> nn.Module:
    import shadow_peft

    config = shadow_peft.ShadowConfig(
        injection_hidden_size=RANK, gate_hidden_size=UPDATE_WIDTH, shadow_intermediate_size=size
    )
    model = shadow_peft.ShadowForCausalLM(shadow_peft.get_shadow_model(base, config))
    return model.to(base.dtype)  # it raises on a bfloat16 base until its user casts it


def _base(base: PreTrainedModel, size: int | None) -> nn.Module:
    return base


OURS = "shadow"
PEERS: dict[str, Contender] = {
    "lora": Contender(_lora, "rank", package="peft"),
    "dora": Contender(_dora, "rank", package="peft"),
    "peft-shadow": Contender(_peft_shadow, "intermediate_size", step=8, package="peft"),
    "shadow-peft": Contender(_shadow_peft, "intermediate_size", step=8, package="shadow_peft"),
    "shadow-recommended": Contender(_recommended, "rank"),
    "base": Contender(_base, None),
}
"""What the paper's variant can be measured against; "base" is the bare base, whose forward pass is the floor."""
CONTENDERS = {OURS: shadow_contender(RANK), **PEERS}


def check_peers(names: Sequence[str], peers: Mapping[str, Contender] = PEERS) -> None:
    """Raise ConfigError on unknown peers or none, ShadowtuneError if the package of one is not installed."""
    if not names:
        raise ConfigError(f"no peer to compare with; choose from {', '.join(peers)}")
    check_known(names, peers)
    for name in names:
        package = peers[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise ShadowtuneError(f"peer {name} needs {package.replace('_', '-')}, which is not installed: {INSTALL}")


def count_contender(
    name: str, config: PreTrainedConfig, size: int | None, contenders: Mapping[str, Contender] = CONTENDERS
) -> int:
    """Count what ``name`` would train on a base of this config, without making any weights.

    Raises:
        ShadowtuneError: if a package refuses the architecture.
    """
    return count_parameters(name, config, lambda base: contenders[name].build(base, size))


def growth_of_contender(
    name: str, config: PreTrainedConfig, contenders: Mapping[str, Contender] = CONTENDERS
) -> Growth:
    """Find out how the trainable parameters of ``name`` grow with its size."""
    return growth_of(lambda size: count_contender(name, config, size, contenders), contenders[name].step)


def equal_budgets(
    config: PreTrainedConfig,
    names: Iterable[str],
    parameters: int | None,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> dict[str, int | None]:
    """Choose sizes at which ours and each contender train equally many parameters, within 3 %.

    Args:
        config: of the base.
        names: the peers.
        parameters: how many to aim at; None for those of ours at its own size.
        contenders: who they are, ours among them.

    Returns:
        The size of ours first, then that of each peer; None where nothing is trained.

    Raises:
        ShadowtuneError: if a package refuses the architecture, or no such sizes exist.
    """
    wanted = parameters or count_contender(OURS, config, None, contenders)
    peers = [name for name in names if name != OURS]
    growths = {name: growth_of_contender(name, config) for name in peers if contenders[name].size_name is not None}
    sizes = equal_sizes(wanted, OURS, growth_of_contender(OURS, config, contenders), growths, WAY_OUT)
    return {name: sizes.get(name) for name in (OURS, *peers)}
