"""Several named adapters on one base, of which one at a time is the model's shadow."""

import os
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shadowtune.attach.sharding import device_of
from shadowtune.config.settings import nearest
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import ConfigError
from shadowtune.model.configuration import ShadowModelConfig

DEFAULT = "default"
"""Name of the adapter that a model is made with."""


@dataclass(frozen=True)
class InactiveAdapter:
    """Trained modules of an adapter that is not in use, by their paths in the model, and its config."""

    modules: dict[str, nn.Module]
    config: ShadowModelConfig


class NamedAdapters(PreTrainedModel):
    """Adds adapters to a model with a base, a config and trained modules.

    Those that are not active are no part of the model: they are neither trained nor saved nor counted, and stay on the
    device where they were used last. ``save_pretrained`` writes the active one. To serve several in one batch use the
    engine (``shadowtune serve cloud``).
    """

    active_adapter: str
    """Name of the adapter that is the model's shadow now."""

    def _init_adapters(self) -> None:
        self.active_adapter = DEFAULT
        self._inactive: dict[str, InactiveAdapter] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters, the active one first."""
        return (self.active_adapter, *self._inactive)

    def add_adapter(self: Any, name: str, config: ShadowConfig | None = None) -> None:  # type: ignore[override]
        """Add a new adapter; the active one stays.

        Args:
            name: not in use yet.
            config: the settings of its shadow; by default those of the active one.

        Raises:
            ConfigError: if the name is in use, or the settings do not fit the base.
        """
        dtype = self.shadow.boundaries.injection_downs.dtype
        self._add(name, lambda: type(self).from_base(self.base, config or self.shadow.config, dtype))

    def load_adapter(self: Any, path_or_id: str | os.PathLike[str], name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Add a saved adapter; the active one stays. Arguments as for ``from_pretrained``.

        Raises:
            ConfigError: if the name is in use.
            CheckpointError: if it cannot be read, or was made for another base.
        """
        self._add(name, lambda: type(self).from_pretrained(path_or_id, base=self.base, **kwargs))

    def _add(self: Any, name: str, make: Any) -> None:
        if name in self.adapters:
            raise ConfigError(f"there is an adapter {name!r} already; delete it, or choose another name")
        made = make()
        self._inactive[name] = InactiveAdapter(made.trained_modules(), made.config)

    def set_adapter(self: Any, name: str) -> None:  # type: ignore[override]
        """Make an adapter the model's shadow; it takes over device, mode and whether the model is in training.

        Raises:
            ConfigError: if there is no such adapter.
        """
        self._check(name)
        if name == self.active_adapter:
            return
        chosen = self._inactive.pop(name)
        self._inactive[self.active_adapter] = InactiveAdapter(self.trained_modules(), self.config)
        self.active_adapter, self.config = name, chosen.config
        for path, module in chosen.modules.items():
            setattr(self, path, module.to(device_of(self.base)).train(self.training))

    def delete_adapter(self, name: str) -> None:  # type: ignore[override]
        """Remove an adapter that is not active.

        Raises:
            ConfigError: if there is no such adapter, or it is active.
        """
        self._check(name)
        if name == self.active_adapter:
            raise ConfigError(f"the adapter {name!r} is active; activate another one first (set_adapter)")
        del self._inactive[name]

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise ConfigError(f"there is no adapter {name!r}{nearest(name, self.adapters)}; there are {known}")
