"""``shadowtune train`` and ``shadowtune pretrain``."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json

TRAIN_EPILOG = """examples:
  shadowtune train configs/clinc150.yaml
  shadowtune train configs/clinc150.yaml method=lora lora.rank=8 output=runs/lora
  shadowtune train configs/clinc150.yaml --resume
  accelerate launch --num_processes 2 -m shadowtune train configs/clinc150.yaml
All settings: docs/settings.md, or shadowtune schema reference.
"""
PRETRAIN_EPILOG = """examples:
  shadowtune pretrain configs/pretrain.yaml
  shadowtune pretrain configs/pretrain.yaml data.train=corpus.txt shadow.hidden_size=192 projection_steps=100
  shadowtune pretrain configs/pretrain.yaml --resume
  shadowtune train configs/clinc150.yaml shadow.init_from=runs/pretrain/model output=runs/from-pretrained
  shadowtune detach runs/pretrain --out small-lm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML file with the settings of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output directory")
    parser.add_argument("--quiet", action="store_true", help="no progress and no sample answers")
    add_json(parser)


def train(arguments: argparse.Namespace) -> int:
    """Fine-tune, and print sizes, times and losses."""
    return _train("train", "Trained", arguments)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain a shadow, and print sizes, times and losses."""
    return _train("pretrain", "Pretrained", arguments, ["stage=pretrain"])


def _train(command: str, title: str, arguments: argparse.Namespace, settings: Sequence[str] = ()) -> int:
    """Train with the settings of the file, of the arguments, and of the command itself."""
    check_json_target(arguments.json)
    from shadowtune.config.loading import load_config
    from shadowtune.config.training import TrainConfig

    config = load_config(TrainConfig, arguments.config, [*arguments.overrides, *settings])
    from shadowtune.training.run import train

    try:
        summary = train(config, arguments.resume, arguments.overwrite, print_status, arguments.quiet)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # the first of the processes of torchrun or accelerate, which writes
            _report(config.output)
        raise
    if summary is None:  # not the main process of a distributed run, which reports
        return 0
    _report(config.output)
    row = {name: value for name, value in asdict(summary).items() if value is not None}
    shown = {name: value for name, value in row.items() if not name.startswith("best_")}  # which has a line of its own
    print_table(f"{title}: {config.output}", [shown])
    write_json(arguments.json, command, [{"run": config.output, **row}])
    return 0


def _report(output: str) -> None:
    """Write the report of a run, if there is one, and name its file."""
    from shadowtune.evaluation.run_report import write_run_report

    if (Path(output) / "config.yaml").is_file():
        print_status(f"report: {write_run_report(output)}")


TRAIN = Command(add_arguments, train, TRAIN_EPILOG)
PRETRAIN = Command(add_arguments, pretrain, PRETRAIN_EPILOG)
