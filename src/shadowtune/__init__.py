"""shadowtune: adapt a large language model once, deploy it twice.

Importing this package registers the model type ``shadow`` with transformers and does nothing else; public names are
imported when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shadowtune.registration import filter_import_warnings, register_when_loaded

if TYPE_CHECKING:
    from shadowtune import models
    from shadowtune.attach import attach
    from shadowtune.config.shadow import ShadowConfig
    from shadowtune.model.causal_lm import ShadowForCausalLM
    from shadowtune.model.classifier import ShadowForSequenceClassification
    from shadowtune.model.configuration import ShadowModelConfig
    from shadowtune.model.methods import get_shadow_model
    from shadowtune.training.stages import train_in_stages

__version__ = "0.1.0"

__all__ = [
    "ShadowConfig",
    "ShadowForCausalLM",
    "ShadowForSequenceClassification",
    "ShadowModelConfig",
    "__version__",
    "attach",
    "get_shadow_model",
    "models",
    "train_in_stages",
]

_MODULES = {
    "ShadowConfig": "shadowtune.config.shadow",
    "ShadowForCausalLM": "shadowtune.model.causal_lm",
    "ShadowForSequenceClassification": "shadowtune.model.classifier",
    "ShadowModelConfig": "shadowtune.model.configuration",
    "attach": "shadowtune.attach",
    "get_shadow_model": "shadowtune.model.methods",
    "models": "shadowtune.models",
    "peft": "shadowtune.peft",
    "train_in_stages": "shadowtune.training.stages",
}
"""Public name -> the module that defines it."""


class _Package(ModuleType):
    """This package; its ``attach`` stays the function when the subpackage of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.attach if name == "attach" and isinstance(value, ModuleType) else value)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'shadowtune' has no attribute {name!r}")
    with filter_import_warnings():
        module = importlib.import_module(_MODULES[name])
    return module if name in ("models", "peft") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_when_loaded()
