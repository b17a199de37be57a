"""Baselines by the names that their users know: training settings of each, and the learning rates that are tried.

A method of a comparison that has one of these names, or names it as its ``method``, starts from these settings; its own
win. Every baseline reaches all linear layers, with the defaults of its paper or of Hugging Face PEFT.
"""

from typing import Any

_ALL_LINEAR = {"target_modules": "all-linear"}
_LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **_ALL_LINEAR}

BASELINES: dict[str, dict[str, Any]] = {
    # alpha = 2 r: the method "lora" with the defaults of LoraConfig; the budget keeps the ratio.
    "lora-alpha-32": {"method": "peft", "peft": _LORA},
    # Kalajdzievski, 2023 (arXiv 2312.03732): scale alpha / sqrt(r).
    "rslora": {"method": "peft", "peft": {**_LORA, "lora_alpha": 16, "use_rslora": True}},
    # Hayou et al., 2024 (arXiv 2402.12354): B learns 16 times as fast as A.
    "lora-plus": {"method": "lora", "optimizer": {"lora_plus_ratio": 16.0}},
    # Kang and Yin, 2024 (arXiv 2409.15371).
    "miss": {"method": "peft", "peft": {"peft_type": "MISS", "r": 16, **_ALL_LINEAR}},
    # Lily: A shared by two neighbouring layers, B by all through a router; the most accurate of PEFT's own benchmark
    # (MetaMathQA, 0.19), with the settings that it has there for all linear layers.
    "lily": {"method": "peft", "peft": {"peft_type": "LILY", "r": 32, "stride_A": 2, "num_B": 2, "scaling": 4.0}},
    # The Shadow tuner of PEFT, with its own defaults and the paper's rank; it cannot pack documents.
    "peft-shadow": {
        "method": "peft",
        "padding_free": False,
        "peft": {"peft_type": "SHADOW", "r": 16, "update_hidden_size": 8},
    },
    # LoRA, and the logits of a small model that learned the task by itself, added with a weight fitted afterwards.
    "lora-ensemble": {"method": "ensemble", "shadow_epochs": 4.0, "shadow": {"init_layers": [0]}},
}
"""By name."""

_USUAL = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
_RATES = {"full": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], "lora-plus": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}


def default_rates(name: str) -> list[float]:
    """Return five learning rates on a logarithmic grid for a method, by its name in ``BASELINES`` or its kind."""
    return list(_RATES.get(name, _USUAL))
