"""``shadowtune train``."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from shadowtune.cli.command import Command, add_json
from shadowtune.cli.output import check_json_target, print_table, say, write_json

EPILOG = """examples:
  shadowtune train configs/clinc150.yaml
  shadowtune train configs/clinc150.yaml method=lora lora.rank=8 output=runs/lora
  shadowtune train configs/clinc150.yaml --resume
  accelerate launch --num_processes 2 -m shadowtune train configs/clinc150.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML file with the settings of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output directory")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and print what it cost."""
    return train_and_report("train", "Trained", arguments)


def train_and_report(verb: str, title: str, arguments: argparse.Namespace, settings: Sequence[str] = ()) -> int:
    """Train as the arguments say and print what it cost.

    Args:
        verb: as typed.
        title: of the table.
        arguments: those that ``add_arguments`` declares.
        settings: ``key=value`` settings that the verb stands for.
    """
    check_json_target(arguments.json)
    from shadowtune.config.loading import load_config
    from shadowtune.config.training import TrainConfig

    config = load_config(TrainConfig, arguments.config, [*arguments.overrides, *settings])
    from shadowtune.training.run import train

    summary = train(config, arguments.resume, arguments.overwrite, say, arguments.quiet)
    if summary is None:  # this process only helped; the main one reports
        return 0
    row = {name: value for name, value in asdict(summary).items() if value is not None}
    print_table(f"{title}: {config.output}", [row])
    write_json(arguments.json, verb, [{"run": config.output, **row}])
    return 0


COMMAND = Command("train", "fine-tune a model: shadow, lora, dora or full", add_arguments, run, EPILOG)
