"""What tells of a far server on the command line: its address, its model, its key, and its prices."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from shadowtune.config.policy import Prices
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.config.cloud import CloudConfig

KEY_VARIABLE = "SHADOWTUNE_CLOUD_KEY"


def add_cloud(parser: argparse.ArgumentParser) -> None:
    """Add ``--cloud-model`` and ``--cloud-key-file``; the verb adds its own ``--cloud``."""
    parser.add_argument(
        "--cloud-model", metavar="NAME", help="what to ask the cloud for (default: what it lists first)"
    )
    parser.add_argument(
        "--cloud-key-file", metavar="FILE", help=f"a file with its API key (default: the variable {KEY_VARIABLE})"
    )


def cloud_of(arguments: argparse.Namespace, **settings: float | int) -> "CloudConfig":
    """Return the settings of the server that ``--cloud`` names; ``settings`` are further ones of ``CloudConfig``.

    Raises:
        ConfigError: if its address or key are none.
    """
    from shadowtune.config.cloud import CloudConfig

    key = _key(arguments.cloud_key_file)
    return CloudConfig(arguments.cloud, arguments.cloud_model, key, **settings)  # type: ignore[arg-type]


def add_prices(parser: "argparse._ActionsContainer") -> None:
    """Add the prices of the cloud."""
    for name, what in (("prompt", "a token that it reads"), ("completion", "one that it writes"), ("request", "each")):
        default = vars(Prices())[name]
        help_ = f"what the cloud takes for {what} (default: {default:g}, or the policy's)"
        parser.add_argument(f"--price-{name}", type=float, metavar="X", help=help_)


def prices_of(arguments: argparse.Namespace, known: Prices) -> Prices:
    """Return the prices that were given, the others as they are known."""
    given = {name: vars(arguments)[f"price_{name}"] for name in vars(known)}
    return Prices(**{name: vars(known)[name] if value is None else value for name, value in given.items()})


def _key(file: str | None) -> str | None:
    """Read the key from a file or the environment."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is not None and not key.strip():
            raise ConfigError(f"{KEY_VARIABLE} is set and has no key in it; write one, or unset it")
        return key
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        key = ""
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise ConfigError(f"--cloud-key-file {file} does not hold a key on one line")
    return key
