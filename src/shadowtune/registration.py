"""Make transformers know the model type ``shadow``: at once if its auto classes are loaded, else as soon as they are.

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
"""The module that every auto class needs, and the first of them to load."""


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
    """Finds modules of transformers as the other finders do, until the auto classes are there.

    It registers when the last of the modules that import each other has run: in the middle of them, what our classes
    derive from may not exist yet.
    """

    def __init__(self) -> None:
        self.running = 0
        """Modules of transformers that have begun to run and have not ended."""
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("transformers.") or fullname in self._asking:
            return None
        self._asking.add(fullname)  # the next line asks this finder too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def ended(self) -> None:
        """Note that a module has run; register if it was the last and the auto classes are among them."""
        self.running -= 1
        if self.running == 0 and AUTO_CONFIG in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, which stays its loader, and tells the finder."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.running += 1
        try:
            self._loader.exec_module(module)
        except BaseException:
            self._finder.running -= 1
            raise
        self._finder.ended()
