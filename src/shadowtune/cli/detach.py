"""``shadowtune detach``."""

import argparse
from pathlib import Path

from shadowtune.cli.command import Command
from shadowtune.cli.output import say
from shadowtune.cli.trained import open_trained

EPILOG = """examples:
  shadowtune detach runs/clinc150 --out clinc150-small
  shadowtune detach runs/clinc150 --out clinc150-small --dtype bfloat16
"""
CHECKED_PROMPTS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", help="run directory of shadowtune train, or a saved shadow")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as trained")


def run(arguments: argparse.Namespace) -> int:
    """Write the detached shadow as a plain transformers directory, checked."""
    import torch

    from shadowtune.export.detaching import write_detached
    from shadowtune.export.exporting import check_free

    out = Path(arguments.out)
    check_free(out)
    trained = open_trained(Path(arguments.run), CHECKED_PROMPTS)
    dtype = vars(torch)[arguments.dtype] if arguments.dtype else None
    model = write_detached(
        trained.model, trained.tokenizer, out, trained.card, trained.prompts, dtype, trained.prompt_format
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {type(model).__name__}, {parameters:,} parameters, {size / 1e6:,.1f} MB")
    say(f"checked: the same logits as detached mode on {len(trained.prompts)} prompts; loads with plain transformers")
    return 0


COMMAND = Command("detach", "write the shadow alone as a plain transformers model", add_arguments, run, EPILOG)
