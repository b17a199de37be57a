"""Tuner of ms-swift: trains a shadow as ``--tuner_type shadow``.

A file that is named by ``--external_plugins`` registers it, with the settings of the shadow:

    from shadowtune.integrations.swift import register

    register(r=16, shadow_num_hidden_layers=1)

ms-swift's tuners have no stages: its trainer minimizes the joint loss (Eq. 9) of base and shadow.
"""

from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from shadowtune.config.settings import raise_errors, unknown_keys
from shadowtune.errors import ConfigError
from shadowtune.peft import ShadowtuneConfig

NAME = "shadow"
"""Default value of ``--tuner_type``."""


def register(name: str = NAME, **settings: Any) -> type[Any]:
    """Register the tuner with ms-swift and return its class.

    Args:
        name: value of ``--tuner_type`` that selects it.
        **settings: fields of ``ShadowtuneConfig``; the task is that of ms-swift.

    Raises:
        ConfigError: if a setting does not exist or is out of its range, or ms-swift has another tuner of this name.
    """
    raise_errors(unknown_keys(ShadowtuneConfig, settings, "register"))
    ShadowtuneConfig(**settings)
    known = tuners_map.get(name)
    if known is not None and known.__module__ != __name__:
        raise ConfigError(f"ms-swift has a tuner {name!r} of its own; register another name")

    class ShadowTuner(PeftTuner):
        """Makes, saves and loads a shadow as an adapter of PEFT; saving and loading are those of ``PeftTuner``."""

        @staticmethod
        def prepare_model(args: Any, model: Any) -> PeftModel:
            """Return the base with a new shadow.

            Args:
                args: of ms-swift; ``task_type`` is "causal_lm" or "seq_cls".
                model: the base.
            """
            return get_peft_model(model, ShadowtuneConfig(**{**settings, "task_type": args.task_type.upper()}))

    tuners_map[name] = ShadowTuner
    return ShadowTuner
