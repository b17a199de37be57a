"""Seconds on two cores to 95 % of LoRA's accuracy on CLINC150: show the rows, or run the protocol and add one.

    python benchmarks/leaderboard.py                                               # check every row and show them
    python benchmarks/leaderboard.py add configs/leaderboard/lora.yaml lora --data DIR    # the first row is LoRA's
    python benchmarks/leaderboard.py add my.yaml my-name --data DIR optimizer.learning_rate=2e-3

The rows are in leaderboard.jsonl. They only grow: a row that was changed or removed is found when it is read. On a
machine that does other work the seconds are too long; the load just before the run stands in the row.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from shadowtune.cli.output import print_table, say
from shadowtune.comparison.leaderboard import append, measure, read, table
from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ShadowtuneError

FILE = Path(__file__).with_name("leaderboard.jsonl")


def main(argv: list[str] | None = None) -> int:
    """Show the leaderboard, or add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="the rows; default: leaderboard.jsonl beside this file")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("add", help="run the protocol and add a row")
    add.add_argument("config", help="YAML file with training settings")
    add.add_argument("name", help="of the row")
    add.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    add.add_argument("--data", metavar="DIR", help="directory of local data; default: from the Hub")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "add":
            _add(arguments)
        rows = table(read(arguments.file))
    except ShadowtuneError as error:
        print(f"leaderboard: error: {error}", file=sys.stderr)
        return 2
    if rows:
        print_table("Seconds to 95 % of LoRA's accuracy on CLINC150", rows)
    else:
        print(f"{arguments.file} has no rows")
    return 0


def _add(arguments: argparse.Namespace) -> None:
    names = {entry.name for entry in read(arguments.file)}
    if arguments.name in names:
        raise ShadowtuneError(f"there is a row {arguments.name} already; choose another name")
    overrides = [*arguments.overrides, *([] if arguments.data is None else [f"data.directory={arguments.data}"])]
    config = load_config(TrainConfig, arguments.config, overrides)
    with tempfile.TemporaryDirectory() as directory:
        append(arguments.file, measure(arguments.name, replace(config, output=f"{directory}/run"), say))


if __name__ == "__main__":
    sys.exit(main())
