"""Options that several commands share: the remote endpoint, its prices, speculative decoding."""

import argparse
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shadowtune.config.serving import CloudConfig, Prices
from shadowtune.config.shadow import DrafterName, SpeculationConfig
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.evaluation.trained_model import TrainedModel

KEY_VARIABLE = "SHADOWTUNE_CLOUD_KEY"


def add_cloud(parser: argparse.ArgumentParser) -> None:
    """Add ``--cloud-model`` and ``--cloud-key-file``; the command adds its own ``--cloud``."""
    parser.add_argument(
        "--cloud-model", metavar="NAME", help="model to request from the cloud (default: the first that it lists)"
    )
    parser.add_argument(
        "--cloud-key-file", metavar="FILE", help=f"file with its API key (default: the variable {KEY_VARIABLE})"
    )


def cloud_of(arguments: argparse.Namespace, **settings: float | int) -> CloudConfig:
    """Return the settings of the endpoint in ``--cloud``; ``settings`` are further fields of ``CloudConfig``.

    Raises:
        ConfigError: if its address or key is not valid.
    """
    key = _key(arguments.cloud_key_file)
    return CloudConfig(arguments.cloud, arguments.cloud_model, key, **settings)  # type: ignore[arg-type]


def add_prices(parser: "argparse._ActionsContainer") -> None:
    """Add the prices of the cloud."""
    for name, what in (("prompt", "prompt token"), ("completion", "completion token"), ("request", "request")):
        default = vars(Prices())[name]
        help_ = f"price of a {what} of the cloud (default: {default:g}, or the policy's)"
        parser.add_argument(f"--price-{name}", type=float, metavar="X", help=help_)


def prices_of(arguments: argparse.Namespace, known: Prices) -> Prices:
    """Return the given prices, and ``known`` for the others."""
    given = {name: vars(arguments)[f"price_{name}"] for name in vars(known)}
    return Prices(**{name: vars(known)[name] if value is None else value for name, value in given.items()})


class _RenamedOption(argparse.Action):
    """Set the option of the new name, and warn."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value."""
        warnings.warn(f"{option} is now called --{self.dest.replace('_', '-')}", FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)


def add_renamed(parser: "argparse._ActionsContainer", old: str, new: str, **settings: Any) -> None:
    """Accept an option under its old name until 0.3.0, with a warning and out of the help.

    Args:
        parser: that has the new one.
        old: the option as typed.
        new: likewise.
        settings: of the new one, such as its type.
    """
    dest = new.removeprefix("--").replace("-", "_")
    parser.add_argument(old, dest=dest, action=_RenamedOption, help=argparse.SUPPRESS, **settings)


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Add ``--speculate`` and ``--drafter``."""
    parser.add_argument(
        "--speculate",
        nargs="?",
        const="auto",
        metavar="N",
        help="the shadow drafts N tokens at a time (default: adapted to the acceptance), the attached model verifies "
        "them: the same answers, faster",
    )
    parser.add_argument(
        "--drafter",
        choices=get_args(DrafterName),
        default="combined",
        help="source of the drafts with --speculate (default: combined)",
    )


def speculation_of(arguments: argparse.Namespace, model: "TrainedModel") -> SpeculationConfig | None:
    """Return the settings of speculative decoding; None without ``--speculate``.

    Raises:
        ConfigError: if it is not a number of tokens, or the model has no shadow.
    """
    if arguments.speculate is None:
        return None
    if not model.drafts:
        source = model.source
        raise ConfigError(
            f"--speculate needs a shadow that generates, but {source.name} is {source.kind}; leave it out"
        )
    if arguments.speculate == "auto":
        return SpeculationConfig(drafter=arguments.drafter)
    if not arguments.speculate.isdecimal():
        raise ConfigError(f"--speculate takes a number of tokens or nothing, got {arguments.speculate!r}")
    return SpeculationConfig(length=int(arguments.speculate), drafter=arguments.drafter)


def _key(file: str | None) -> str | None:
    """Read the API key from a file or the environment."""
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
