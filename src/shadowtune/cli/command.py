"""What a subcommand is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One verb of the command line."""

    name: str
    """One word or two, as typed."""
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Do the work and return the exit code; heavy imports belong inside."""
    epilog: str = ""
    """Examples with their output."""

    @property
    def words(self) -> int:
        """How many words the name has."""
        return len(self.name.split())


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``."""
    parser.add_argument("--json", metavar="FILE", help="also write the result as one JSON object to FILE")
