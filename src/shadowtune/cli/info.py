"""``shadowtune info``."""

import argparse
from typing import Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_table, write_json
from shadowtune.cli.source import source_path

EPILOG = """examples:
  shadowtune info runs/clinc150
  shadowtune info path/to/an-adapter-of-peft
  shadowtune info my-name/clinc150
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "run", help="run of shadowtune train, or a saved shadow: ours, shadow-peft's or PEFT's; or a Hub id"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print settings, sizes, and time and memory of training."""
    check_json_target(arguments.json)
    from shadowtune.evaluation.inspection import describe

    facts: dict[str, Any] = describe(source_path(arguments.run))
    print_table(arguments.run, [{"what": key, "value": value} for key, value in facts.items()])
    write_json(arguments.json, "info", [facts])
    return 0


INFO = Command(add_arguments, run, EPILOG)
