"""Make transformers know the model type ``shadow``: at once if it is loaded, else as soon as its auto classes are.

So importing ``shadowtune`` costs nothing of transformers and torch (two seconds) before they are used, and
``AutoModelForCausalLM.from_pretrained`` opens a saved shadow whichever of the two packages is imported first.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from shadowtune.quiet import quiet_imports

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODELS = "transformers.models.auto.modeling_auto"
"""The modules of the auto classes; the second imports the first."""


def register_when_loaded() -> None:
    """Register now or, where no auto class is loaded yet, when one is."""
    if AUTO_CONFIG in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Register the config and the model classes with transformers. Calling it again changes nothing."""
    with quiet_imports():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        from shadowtune.model.causal_lm import ShadowForCausalLM
        from shadowtune.model.classifier import ShadowForSequenceClassification
        from shadowtune.model.configuration import ShadowModelConfig

    AutoConfig.register("shadow", ShadowModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(ShadowModelConfig, ShadowForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ShadowModelConfig, ShadowForSequenceClassification, exist_ok=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the auto classes as the other finders do, and registers after they have run."""

    def __init__(self) -> None:
        self._wanted = {AUTO_CONFIG, AUTO_MODELS}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._wanted:
            return None
        self._wanted.remove(fullname)  # so that this finder is not asked again by the next line
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, then registers, unless the other module is on its way and will."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__name__ == AUTO_MODELS or AUTO_MODELS not in sys.modules:
            register()
