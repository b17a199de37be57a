"""Quantized bases: how they are loaded, and stay differentiable.

As in QLoRA (https://arxiv.org/abs/2305.14314), gradients pass through the frozen weights.
"""

import sys
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from shadowtune.errors import ShadowtuneError

Quantization = Literal["none", "int8", "int4", "nf4"]
"""Weights of a base. int8: one scale per row. int4: one scale per 32 weights. nf4: the 4-bit floats of QLoRA."""
INT4_GROUP = 32


def quantization_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keywords of ``from_pretrained`` that load a base with quantized linear layers.

    Args:
        quantization: "int8" and "int4" are torchao's weight-only kinds (on a CPU torchao keeps each 4-bit number in a
            byte of its own), "nf4" is bitsandbytes'.
        dtype: of the matrix products.

    Raises:
        ShadowtuneError: if the library is not installed.
    """
    if quantization == "none":
        return {}
    try:
        return {"quantization_config": _nf4(dtype) if quantization == "nf4" else _integers(quantization)}
    except ImportError as error:
        raise ShadowtuneError(
            f"base_quantization {quantization} needs {error.name}: pip install 'shadowtune[quant]'"
        ) from None


def _integers(quantization: Quantization) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    int4 = torch.int4  # type: ignore[attr-defined]  # torch has it, its type stubs do not
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(INT4_GROUP)))


def _nf4(dtype: torch.dtype) -> Any:
    import bitsandbytes  # noqa: F401 - transformers asks for it much later, with another error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_differentiable(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on some CPUs, as it does in the first evaluation.

    Its product with repacked weights has no backward pass, so every gradient after that evaluation would be wrong.
    """
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
