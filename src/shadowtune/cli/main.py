"""Entry point of ``shadowtune COMMAND ...``: exit code 0 on success, 2 with one line on an error, 130 on Ctrl-C."""

import argparse
import contextlib
import importlib
import io
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NoReturn

from shadowtune.cli.command import Command
from shadowtune.errors import ShadowtuneError
from shadowtune.registration import NOISY_LOGGERS


@dataclass(frozen=True)
class Entry:
    """A subcommand in the overview, whose module is imported when it is used."""

    name: str
    """One word or two, as typed."""
    target: str
    """Module below ``shadowtune.cli`` and the name of its ``Command``."""
    help: str

    def load(self) -> Command:
        """Import the command."""
        module, name = self.target.split(":")
        command: Command = vars(importlib.import_module(f"shadowtune.cli.{module}"))[name]
        return command


COMMANDS = (
    Entry("demo", "demo:DEMO", "fine-tune with a shadow and with LoRA, compare them, show the result"),
    Entry("init", "train:INIT", "write a settings file with the recommended recipe"),
    Entry("data", "data:DATA", "show a data set as the model will see it, token by token"),
    Entry("plan", "plan:PLAN", "parameters, memory and time of a training run before it starts"),
    Entry("train", "train:TRAIN", "fine-tune a model: shadow, lora, dora or full"),
    Entry("pretrain", "train:PRETRAIN", "train a shadow by itself before any task, on plain text"),
    Entry("adapt", "adapt:ADAPT", "train a run's detached shadow on further examples, and re-attach it"),
    Entry("evaluate", "evaluate:EVALUATE", "measure a trained run on held-out examples"),
    Entry("lm-eval", "lm_eval:LM_EVAL", "measure a trained run by the lm-evaluation-harness"),
    Entry("compare", "compare:COMPARE", "compare methods on tasks: equal budgets, intervals, a report"),
    Entry("generate", "generate:GENERATE", "answer prompts with a trained run or any other model"),
    Entry("chat", "chat:CHAT", "talk with a trained run or any other model in the terminal"),
    Entry("predict", "predict:PREDICT", "label the rows of a file: classes of a classifier, or generated answers"),
    Entry("serve cloud", "serve:CLOUD", "serve attached models over HTTP"),
    Entry("serve edge", "serve:EDGE", "serve a detached model, and defer some requests to a cloud"),
    Entry("calibrate", "calibrate:CALIBRATE", "choose when an edge defers to its cloud"),
    Entry("simulate", "simulate:SIMULATE", "replay recorded answers through edge, cloud and routing policies"),
    Entry("detach", "export:DETACH", "write the shadow alone as a plain transformers model"),
    Entry("export", "export:EXPORT", "write the shadow alone as GGUF, ONNX or smaller safetensors"),
    Entry("push", "push:PUSH", "upload a trained model with its card to the Hugging Face Hub, private by default"),
    Entry("convert", "convert:CONVERT", "convert a shadow to or from the format of another library"),
    Entry("info", "info:INFO", "describe a run directory or a saved shadow"),
    Entry("doctor", "doctor:DOCTOR", "check a run or a saved shadow: masks, ends, base, logits of all its forms"),
    Entry("schema", "schema:SCHEMA", "print the JSON schema of settings files, or the settings reference"),
)
"""All subcommands, in the order of a user's day."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line with exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"shadowtune: error: {message} (see {self.prog} --help)\n")


def build_parser(entry: Entry) -> argparse.ArgumentParser:
    """Build the parser of one subcommand."""
    command = entry.load()
    parser = _Parser(
        prog=f"shadowtune {entry.name}",
        description=entry.help,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return parser


def overview() -> str:
    """Return the text of ``shadowtune --help``."""
    lines = [f"  {entry.name:<12} {entry.help}" for entry in COMMANDS]
    head = (
        "usage: shadowtune COMMAND ... | --version\n\nAdapt a large language model once, deploy it twice.\n\ncommands:"
    )
    return "\n".join([head, *lines, "", "shadowtune COMMAND --help shows the arguments of each, with examples."])


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    _filter_warnings()
    if not argv or argv[0] in ("-h", "--help", "--version"):
        import shadowtune

        print(f"shadowtune {shadowtune.__version__}" if argv[:1] == ["--version"] else overview())
        return 0
    entry = next((each for each in COMMANDS if list(argv[: len(each.name.split())]) == each.name.split()), None)
    if entry is None:
        return _unknown_command(argv)
    arguments = build_parser(entry).parse_intermixed_args(argv[len(entry.name.split()) :])
    try:
        return entry.load().run(arguments)
    except ShadowtuneError as error:
        if error.in_every_process and os.environ.get("RANK", "0") != "0":
            return 2
        return _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print("\nshadowtune: interrupted; finished checkpoints are kept, --resume uses them", file=sys.stderr)
        return 130


def _unknown_command(argv: Sequence[str]) -> int:
    names = [entry.name for entry in COMMANDS]
    typed = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), argv[:2])) or argv[0]
    near = get_close_matches(typed, names, n=1) or get_close_matches(argv[0], names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return _fail(f"unknown command {typed!r}{hint}; commands: {', '.join(names)}")


def _filter_warnings() -> None:
    """Keep libraries' notes to their own developers off the terminal; their errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in (*NOISY_LOGGERS, "transformers", "bitsandbytes", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str) -> int:
    print(f"shadowtune: error: {message}", file=sys.stderr)
    return 2


class _ResilientStream(io.TextIOWrapper):
    """Drops what cannot be written, so that a full disk under the log stops neither a server nor a training run."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def use_plain_progress() -> None:
    """Hide the progress bars of libraries, which fill a log with fragments, unless standard error is a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, also in child processes


def make_stderr_resilient() -> None:
    """Let this process continue if standard error cannot be written any more."""
    old = sys.stderr
    if isinstance(old, io.TextIOWrapper):
        encoding, errors = old.encoding, old.errors
        sys.stderr = _ResilientStream(old.detach(), encoding, errors, line_buffering=True)


def run() -> NoReturn:
    """Run the console script."""
    make_stderr_resilient()
    use_plain_progress()
    sys.exit(main(sys.argv[1:]))
