"""``shadowtune convert``."""

import argparse
from pathlib import Path

from shadowtune.cli.command import Command, add_json, check_json_target, write_json

EPILOG = """examples:
  shadowtune convert runs/clinc150 out/clinc150 --format shadow-peft
  shadowtune convert adapter out/adapter --format shadowtune --base Qwen/Qwen3-0.6B
  shadowtune convert adapter out/plain --format plain --base Qwen/Qwen3-0.6B
"""
FORMATS = ("shadowtune", "shadowtune-peft", "shadow-peft", "peft", "plain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help="run, saved shadow, adapter of shadow-peft or PEFT, or projected model")
    parser.add_argument("target", help="new directory")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="shadowtune-peft: as an adapter of shadowtune.peft; plain: the detached shadow as an ordinary model",
    )
    parser.add_argument("--base", help="base model, where the source names none (shadow-peft never does)")
    parser.add_argument("--backbone", help="model of the backbone's architecture, where it is not a mirror of the base")
    parser.add_argument("--task", choices=("causal_lm", "classification"), help="default: what the source says")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print the files and what the format cannot represent."""
    check_json_target(arguments.json)
    from shadowtune.model.formats.conversion import convert

    done = convert(
        arguments.source,
        Path(arguments.target),
        arguments.format,
        arguments.base,
        arguments.backbone,
        arguments.task,
    )
    print(f"wrote {arguments.target} ({arguments.format}): {', '.join(done.files)}")
    for note in done.notes:
        print(f"note: {note}")
    row = {"target": arguments.target, "format": arguments.format, "files": list(done.files), "notes": list(done.notes)}
    write_json(arguments.json, "convert", [row])
    return 0


CONVERT = Command(add_arguments, run, EPILOG)
