"""Entry point of ``shadowtune VERB ...``: 0 when it worked, 2 with one line when it could not, 130 on Ctrl-C."""

import argparse
import itertools
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import NoReturn

from shadowtune.cli.command import Command
from shadowtune.cli.standard_error import let_standard_error_fail
from shadowtune.config.checking import nearest
from shadowtune.errors import ShadowtuneError
from shadowtune.quiet import TALKATIVE


class _Parser(argparse.ArgumentParser):
    """Bad arguments end in one line and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"shadowtune: error: {message} (see {self.prog} --help)\n")


def commands() -> list[Command]:
    """Return all verbs, in the order of a user's day; some have two words."""
    from shadowtune.cli import (
        calibrate,
        compare,
        convert,
        demo,
        detach,
        evaluate,
        export,
        generate,
        info,
        lm_eval,
        pretrain,
        serve,
        serve_edge,
        simulate,
        train,
    )

    return [
        demo.COMMAND,
        train.COMMAND,
        pretrain.COMMAND,
        evaluate.COMMAND,
        lm_eval.COMMAND,
        compare.COMMAND,
        generate.COMMAND,
        serve.COMMAND,
        serve_edge.COMMAND,
        calibrate.COMMAND,
        simulate.COMMAND,
        detach.COMMAND,
        export.COMMAND,
        convert.COMMAND,
        info.COMMAND,
    ]


def build_parser(command: Command) -> argparse.ArgumentParser:
    """Build the parser of one verb."""
    parser = _Parser(
        prog=f"shadowtune {command.name}",
        description=command.help,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return parser


def overview(verbs: Iterable[Command]) -> str:
    """Return the text of ``shadowtune --help``."""
    lines = [f"  {command.name:<14} {command.help}" for command in verbs]
    head = "usage: shadowtune VERB ... | --version\n\nAdapt a large language model once, deploy it twice.\n\nverbs:"
    return "\n".join([head, *lines, "", "shadowtune VERB --help tells the arguments of each, with examples."])


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    _quiet_libraries()
    verbs = commands()
    if not argv or argv[0] in ("-h", "--help", "--version"):
        import shadowtune

        print(f"shadowtune {shadowtune.__version__}" if argv[:1] == ["--version"] else overview(verbs))
        return 0
    command = next((verb for verb in verbs if list(argv[: verb.words]) == verb.name.split()), None)
    if command is None:
        names = [verb.name for verb in verbs]
        typed = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), argv[:2])) or argv[0]
        near = nearest(typed, names) or nearest(argv[0], names)
        return _fail(f"unknown verb {typed!r}{near}; verbs: {', '.join(names)}")
    arguments = build_parser(command).parse_intermixed_args(argv[command.words :])
    try:
        return command.run(arguments)
    except ShadowtuneError as error:
        return _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print("\nshadowtune: interrupted; finished checkpoints are kept, --resume uses them", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Keep libraries' notes to their own developers off the terminal; their errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in (*TALKATIVE, "transformers", "bitsandbytes", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str) -> int:
    print(f"shadowtune: error: {message}", file=sys.stderr)
    return 2


def run() -> NoReturn:
    """Console script."""
    let_standard_error_fail()
    sys.exit(main(sys.argv[1:]))
