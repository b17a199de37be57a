"""``shadowtune pretrain``."""

import argparse

from shadowtune.cli.command import Command
from shadowtune.cli.train import add_arguments, train_and_report

EPILOG = """examples:
  shadowtune pretrain configs/pretrain.yaml
  shadowtune pretrain configs/pretrain.yaml data.train=corpus.txt shadow.hidden_size=192 projection_steps=100
  shadowtune pretrain configs/pretrain.yaml --resume
  shadowtune train configs/clinc150.yaml shadow.init_from=runs/pretrain/model output=runs/from-pretrained
  shadowtune detach runs/pretrain --out small-lm
"""


def run(arguments: argparse.Namespace) -> int:
    """Pretrain and print what it cost."""
    return train_and_report("pretrain", "Pretrained", arguments, ["stage=pretrain"])


COMMAND = Command("pretrain", "train a shadow by itself before any task, on plain text", add_arguments, run, EPILOG)
