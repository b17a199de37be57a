"""``shadowtune adapt``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.errors import ConfigError

EPILOG = """examples:
  shadowtune adapt runs/robot --data private.jsonl --output runs/robot-mine
  shadowtune detach runs/robot-mine --out robot-mine
  shadowtune evaluate runs/robot-mine --data held-out.jsonl

The detached shadow learns the examples by itself, without the base's blocks. The new run's adapter has the boundaries
of the earlier one. With shadow.variant stateless and without logit_interpolation its attached model is the same as
before; otherwise it reads the shadow's new states, so evaluate it. A deferral head is not carried over.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", help="a finished run of the method shadow; it is not changed")
    parser.add_argument("--data", required=True, metavar="FILE", help="examples in the run's format (data.train)")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the new run")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the examples (default: %(default)g)")
    parser.add_argument("--learning-rate", type=float, metavar="R", help="peak (default: that of the run's shadow)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output directory")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train the shadow alone, and re-attach it."""
    check_json_target(arguments.json)
    if not arguments.epochs > 0:
        raise ConfigError(f"--epochs must be above 0, got {arguments.epochs:g}")
    from shadowtune.training.adaptation import adapt, adaptation_settings

    source, output = Path(arguments.run), Path(arguments.output)
    settings = adaptation_settings(source, arguments.data, output, arguments.epochs, arguments.learning_rate)
    summary = adapt(source, settings, arguments.overwrite, print_status, arguments.quiet)
    if summary is None:  # not the main process of a distributed run, which reports
        return 0
    row = {name: value for name, value in asdict(summary).items() if value is not None}
    print_table(f"Adapted: {output}", [row])
    write_json(arguments.json, "adapt", [{"run": str(output), **row}])
    return 0


ADAPT = Command(add_arguments, run, EPILOG)
