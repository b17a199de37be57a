"""The measured adaptation methods: the shadow and the baselines, each built as its own users build it.

Defaults are those of each package or paper: LoRA and DoRA on all linear layers with dropout 0.05 and alpha 32, the
shadows with rank 16, update width 8, dropout 0.2 and the auxiliary loss. One size of each method is free; it is chosen
so that the numbers of trainable parameters are equal.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.benchmark import check_known
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import LoraConfig
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.budget import Growth, count_parameters, equal_sizes, growth_of
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.methods import make_trainable

INSTALL = "pip install 'shadowtune[bench]'"
RANK, UPDATE_WIDTH = 16, 8
HINT = "pass another --parameters or leave the baseline out of --baselines"
"""For errors where budgets cannot be made equal."""


@dataclass(frozen=True)
class Method:
    """A way to adapt a base model."""

    build: Callable[[PreTrainedModel, int | None], nn.Module]
    """(frozen base, size) -> model to train; for ours, size None means the default."""
    size_name: str | None
    """The free size, for instance ``rank``; None if nothing is trained."""
    step: int = 1
    """The size is a multiple of this."""
    package: str | None = None
    """Import name of a package that it needs."""

    def describe(self, size: int | None) -> str | None:
        """Return a size as in the result rows, for instance ``rank 15``."""
        return None if size is None else f"{self.size_name} {size}"


def shadow_method(rank: int) -> Method:
    """Return our method with an injection of this rank."""

    def build(base: PreTrainedModel, size: int | None) -> nn.Module:
        config = ShadowConfig(rank=rank, update_width=UPDATE_WIDTH, intermediate_size=size)
        return make_trainable(base, "shadow", shadow=config)

    return Method(build, "intermediate_size", step=8)


def _recommended(base: PreTrainedModel, size: int | None) -> nn.Module:
    """Build the model of the recipe's joint stage, in which the shadow backbone is frozen."""
    assert size is not None
    config = ShadowConfig.recommended(rank=size, init_layers=None, shadow_loss_weight=0.0)
    model = cast(ShadowForCausalLM, make_trainable(base, "shadow", shadow=config))
    model.freeze_unused()
    return model


def _lora(base: PreTrainedModel, size: int | None) -> nn.Module:
    assert size is not None
    return make_trainable(base, "lora", lora=LoraConfig(rank=size))


def _lora_liger(base: PreTrainedModel, size: int | None) -> nn.Module:
    """Build LoRA on a base with liger-kernel's operations and fused loss, as ``use_liger_kernel=True`` does."""
    if base.device.type != "meta":  # where parameters are counted; it exchanges functions of the whole process
        from transformers.integrations.liger import apply_liger_kernel

        interpreted = base.device.type == "cpu"  # by Triton's interpreter, which cannot run the kernels of these two
        apply_liger_kernel(base, {"rms_norm": False, "swiglu": False} if interpreted else None)
    return _lora(base, size)


def _dora(base: PreTrainedModel, size: int | None) -> nn.Module:
    assert size is not None
    return make_trainable(base, "dora", lora=LoraConfig(rank=size))


def _peft_shadow(base: PreTrainedModel, size: int | None) -> nn.Module:
    try:
        from peft import ShadowConfig as PeftShadowConfig
        from peft import get_peft_model
    except ImportError:
        raise ShadowtuneError(f"baseline peft-shadow needs peft 0.21 or later: {INSTALL}") from None
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
BASELINES: dict[str, Method] = {
    "lora": Method(_lora, "rank", package="peft"),
    "dora": Method(_dora, "rank", package="peft"),
    "peft-shadow": Method(_peft_shadow, "intermediate_size", step=8, package="peft"),
    "shadow-peft": Method(_shadow_peft, "intermediate_size", step=8, package="shadow_peft"),
    "shadow-recommended": Method(_recommended, "rank"),
    "base": Method(_base, None),
}
"""What the paper's variant is measured against; "base" is the bare base, whose forward pass is the lower bound."""
CUDA_BASELINES: dict[str, Method] = {"lora-liger": Method(_lora_liger, "rank", package="liger_kernel")}
"""Baselines whose kernels run on CUDA devices, or very slowly in Triton's interpreter; they are measured on demand."""
METHODS = {OURS: shadow_method(RANK), **BASELINES, **CUDA_BASELINES}


def check_baselines(
    names: Sequence[str], baselines: Mapping[str, Method] = {**BASELINES, **CUDA_BASELINES}, device: str = "cuda"
) -> None:
    """Check baselines for a device.

    Raises:
        ConfigError: if one is unknown or does not run on the device, or there is none.
        ShadowtuneError: if its package is not installed.
    """
    if not names:
        raise ConfigError(f"no baseline to compare with; choose from {', '.join(baselines)}")
    check_known(names, baselines)
    for name in names:
        if name in CUDA_BASELINES and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                f"baseline {name} runs on CUDA devices; pass --device cuda, leave it out, or set TRITON_INTERPRET=1 to "
                "see it work on a CPU"
            )
        package = baselines[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            install = "pip install liger-kernel" if package == "liger_kernel" else INSTALL
            raise ShadowtuneError(
                f"baseline {name} needs {package.replace('_', '-')}, which is not installed: {install}"
            )


def count_method(name: str, config: PreTrainedConfig, size: int | None, methods: Mapping[str, Method] = METHODS) -> int:
    """Count the trainable parameters of a method on a base of this config, without allocating weights.

    Raises:
        ShadowtuneError: if a package refuses the architecture.
    """
    return count_parameters(name, config, lambda base: methods[name].build(base, size))


def growth_of_method(name: str, config: PreTrainedConfig, methods: Mapping[str, Method] = METHODS) -> Growth:
    """Return how the trainable parameters of a method grow with its size."""
    return growth_of(lambda size: count_method(name, config, size, methods), methods[name].step)


def equal_budgets(
    config: PreTrainedConfig,
    names: Iterable[str],
    parameters: int | None,
    methods: Mapping[str, Method] = METHODS,
) -> dict[str, int | None]:
    """Choose sizes at which ours and each baseline train equally many parameters, within 3 %.

    Args:
        config: of the base.
        names: the baselines.
        parameters: the number to aim at; None for that of ours at its default size.
        methods: their definitions, ours among them.

    Returns:
        The size of each method, ours first; None where nothing is trained.

    Raises:
        ShadowtuneError: if a package refuses the architecture, or no such sizes exist.
    """
    wanted = parameters or count_method(OURS, config, None, methods)
    baselines = [name for name in names if name != OURS]
    growths = {name: growth_of_method(name, config) for name in baselines if methods[name].size_name is not None}
    sizes = equal_sizes(wanted, OURS, growth_of_method(OURS, config, methods), growths, HINT)
    return {name: sizes.get(name) for name in (OURS, *baselines)}
