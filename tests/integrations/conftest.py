"""Axolotl and ms-swift: the installed packages, else modules with the parts of their interfaces that are used here.

Both pin older versions of transformers and PEFT than this package needs, so they are no test dependencies.
"""

import dataclasses
import importlib.util
import sys
from types import ModuleType

import pytest
from peft import PeftModel


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    """As in axolotl.integrations.base (0.19)."""

    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """As in axolotl.integrations.base (0.19)."""

    def __init__(self):
        pass


class PeftTuner:
    """As in swift.tuner_plugin (4.6)."""

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


def provide(monkeypatch, package, **modules):
    """Add modules of a package that is not installed."""
    if importlib.util.find_spec(package) is not None:
        return
    for name, contents in {"": {}, **modules}.items():
        module = ModuleType(f"{package}.{name}".rstrip("."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def axolotl(monkeypatch):
    """The plugin's module."""
    base = {"BasePlugin": BasePlugin, "AdapterCapabilities": AdapterCapabilities}
    provide(monkeypatch, "axolotl", integrations={}, **{"integrations.base": base})
    from shadowtune.integrations import axolotl

    return axolotl


@pytest.fixture
def swift(monkeypatch):
    """The tuner's module, with no tuner of ours registered."""
    provide(monkeypatch, "swift", tuner_plugin={"PeftTuner": PeftTuner, "tuners_map": {"dummy": PeftTuner}})
    from shadowtune.integrations import swift

    monkeypatch.setattr(swift, "tuners_map", dict(swift.tuners_map))
    return swift
