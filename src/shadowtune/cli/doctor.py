"""``shadowtune doctor``."""

import argparse
from dataclasses import asdict

from shadowtune.cli.command import Command, add_json, check_json_target, write_json
from shadowtune.cli.source import source_path
from shadowtune.errors import ConfigError

EPILOG = """examples:
  shadowtune doctor runs/clinc150
  shadowtune doctor runs/clinc150 --against runs/clinc150-q8_0.gguf
  shadowtune doctor path/to/adapter --json findings.json
The exit code is 1 if there is a problem.
"""
COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN|ADAPTER", help="run of shadowtune train, a saved shadow, or its Hub id")
    against = "exported file or directory to compare (default: those beside the run); may be repeated"
    parser.add_argument("--against", action="append", default=[], metavar="PATH", help=against)
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="examples to show (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the tokens of some examples, the prompt of a chat client, and a line for each check."""
    check_json_target(arguments.json)
    if arguments.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {arguments.samples}")
    from rich.console import Console
    from rich.text import Text

    from shadowtune.evaluation.diagnosis import diagnose

    found = diagnose(source_path(arguments.run), arguments.against, arguments.samples)
    console = Console(soft_wrap=True)
    for number, sample in enumerate(found.samples, 1):
        line = Text(f"example {number}: ")
        for token, learned in sample:  # brackets, for terminals without colours
            line.append(f"[{token}]" if learned else token, style="bold green" if learned else "dim")
            line.append(" ")
        console.print(line)
    if found.chat is not None:
        console.print(Text(f"a chat client sends: {found.chat!r}"))
    for finding in found.findings:
        line = Text(f"{finding.status:<8}", style=COLORS[finding.status])
        console.print(line.append(f"{finding.check}: {finding.text}", style="default"))
    write_json(arguments.json, "doctor", [asdict(each) for each in found.findings], samples=found.samples)
    return int(any(each.status == "problem" for each in found.findings))


DOCTOR = Command(add_arguments, run, EPILOG)
