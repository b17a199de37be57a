"""``shadowtune schema``: the generated JSON schemas and the settings reference."""

import argparse
import json

from shadowtune.cli.command import Command
from shadowtune.config.schema import SCHEMAS, json_schema, settings_reference

EPILOG = """examples:
  shadowtune schema train > train.schema.json
  shadowtune schema reference > settings.md
With "# yaml-language-server: $schema=train.schema.json" as its first line, a settings file is completed and checked by
editors that have the YAML language server.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", choices=(*SCHEMAS, "reference"), help="kind of settings files, or the reference of all")


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    print(settings_reference() if arguments.what == "reference" else json.dumps(json_schema(arguments.what), indent=1))
    return 0


SCHEMA = Command(add_arguments, run, EPILOG)
