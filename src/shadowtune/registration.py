"""Register the model type ``shadow`` with transformers: now if its auto classes are loaded, else when they are.

So importing ``shadowtune`` does not import transformers and torch (two seconds), and
``AutoModelForCausalLM.from_pretrained`` loads a saved shadow whichever package is imported first.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
"""The module that every auto class imports, and the first of them to load."""
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn on import of optional parts that are missing, or of future changes in torch."""


@contextlib.contextmanager
def filter_import_warnings() -> Iterator[None]:
    """Within this context, let ``NOISY_LOGGERS`` log errors only."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in NOISY_LOGGERS}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def register_when_loaded() -> None:
    """Register now or, if no auto class is loaded yet, when one is."""
    if AUTO_CONFIG in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Register the config and the model classes with transformers, and warn of untested versions. Idempotent."""
    with filter_import_warnings():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        from shadowtune.model.causal_lm import ShadowForCausalLM
        from shadowtune.model.classifier import ShadowForSequenceClassification
        from shadowtune.model.configuration import ShadowModelConfig
        from shadowtune.versions import warn_of_untested_versions

    warn_of_untested_versions()
    AutoConfig.register("shadow", ShadowModelConfig, exist_ok=True)
    AutoModelForCausalLM.register(ShadowModelConfig, ShadowForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ShadowModelConfig, ShadowForSequenceClassification, exist_ok=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of transformers' modules until the auto classes are loaded, and then registers.

    It registers after the outermost of the modules that import each other: before that, base classes of ours may not
    exist yet.
    """

    def __init__(self) -> None:
        self.running = 0
        """Modules of transformers that are being executed."""
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("transformers.") or fullname in self._asking:
            return None
        self._asking.add(fullname)  # the next line calls this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def ended(self) -> None:
        """Count a module as executed; register if it was the outermost one and the auto classes are loaded."""
        self.running -= 1
        if self.running == 0 and AUTO_CONFIG in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _Loader(importlib.abc.Loader):
    """Executes a module by its own loader, and reports to the finder when it is done."""

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
        except BaseException:  # of any kind; it is raised again
            self._finder.running -= 1
            raise
        self._finder.ended()
