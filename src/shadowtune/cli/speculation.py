"""The options of speculative decoding, for every command that generates."""

import argparse
from typing import TYPE_CHECKING, get_args

from shadowtune.config.speculation import DrafterName, SpeculationConfig
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.evaluation.run import FinishedRun


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Add ``--speculate`` and ``--drafter``."""
    parser.add_argument(
        "--speculate",
        nargs="?",
        const="auto",
        metavar="N",
        help="the shadow drafts N tokens at a time (default: as many as pay), the attached model verifies them: "
        "the same answers, sooner",
    )
    parser.add_argument(
        "--drafter",
        choices=get_args(DrafterName),
        default="combined",
        help="who drafts with --speculate (default: combined)",
    )


def speculation_of(arguments: argparse.Namespace, finished: "FinishedRun") -> SpeculationConfig | None:
    """Return what the options ask for; None without ``--speculate``.

    Raises:
        ConfigError: if it is not a number of tokens, or the run has no shadow.
    """
    if arguments.speculate is None:
        return None
    if not finished.config.leaves_shadow or finished.config.task != "causal_lm":
        kind = f"{finished.config.method} {finished.config.task}"
        raise ConfigError(
            f"--speculate needs a shadow that generates, but {finished.path} is a {kind} run; leave it out"
        )
    if arguments.speculate == "auto":
        return SpeculationConfig(drafter=arguments.drafter)
    if not arguments.speculate.isdecimal():
        raise ConfigError(f"--speculate takes a number of tokens or nothing, got {arguments.speculate!r}")
    return SpeculationConfig(length=int(arguments.speculate), drafter=arguments.drafter)
