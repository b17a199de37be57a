"""``shadowtune chat``."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, write_json
from shadowtune.cli.generate import read_fields, write_text
from shadowtune.cli.source import SOURCE, open_source
from shadowtune.errors import ConfigError, DataError, ShadowtuneError

if TYPE_CHECKING:
    from shadowtune.evaluation.generation import GeneratedAnswer, GenerationOptions
    from shadowtune.evaluation.trained_model import TrainedModel
    from shadowtune.export.loading import LoadedModel

EPILOG = """examples:
  shadowtune chat runs/clinc150
  shadowtune chat clinc150-q8_0.gguf --system "Answer in one word."
  printf 'wake me at six\\nand at seven\\n' | shadowtune chat runs/clinc150 --mode detached
In a terminal Ctrl-C stops an answer and Ctrl-D ends. Each line of a pipe is a message. A message that begins with / is
written with two.
"""
HELP = "/reset forgets the conversation; /mode MODE and /system TEXT change it; /exit or Ctrl-D ends"


class ChatSession:
    """A conversation with one mode of a model at a time; a context manager.

    Args:
        source: the model.
        mode: the first mode.
        options: of the answers; ``max_new_tokens`` is lowered to what fits the model's positions.
        fields: of the model's prompt template, beside the one that a message fills.
    """

    def __init__(
        self, source: "TrainedModel", mode: str, options: "GenerationOptions", fields: Mapping[str, str]
    ) -> None:
        self.source, self._options, self._fields = source, options, fields
        self.remembers = source.prompt_format.takes_conversations(source.tokenizer)
        """Whether the model reads earlier turns."""
        self.system: list[dict[str, str]] = []
        self.turns: list[dict[str, str]] = []
        """Messages of user and assistant, in pairs."""
        self._stack = ExitStack()
        self.set_mode(mode)

    def __enter__(self) -> "ChatSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def set_mode(self, mode: str) -> None:
        """Answer in another mode from now on; raises ConfigError if the model has none such."""
        self.source.check_mode(mode)
        self._stack.close()
        self.mode = mode
        self._opened: LoadedModel = self._stack.enter_context(self.source.loaded(mode))

    def set_system(self, text: str) -> None:
        """Set the system message and forget the conversation; raises ConfigError if the model reads none."""
        if text and not self.remembers:
            raise ConfigError(f"{self.source.source.name} was trained on single requests and reads no system message")
        self.system = [{"role": "system", "content": text}] if text else []
        self.turns = []

    def answer(self, text: str, write: Callable[[str], None]) -> "GeneratedAnswer | None":
        """Answer a message; on KeyboardInterrupt keep what was written of the answer, and return None.

        Args:
            text: the message.
            write: called with each chunk of the answer.

        Raises:
            DataError: if the message does not fit the model, or its chat template refuses the conversation.
        """
        from shadowtune.evaluation.generation import stream_answer

        message = {"role": "user", "content": text}
        ids, room = self._prompt(message)
        chunks: list[str] = []

        def keep(chunk: str) -> None:
            chunks.append(chunk)
            write(chunk)

        options = replace(self._options, max_new_tokens=min(self._options.max_new_tokens, room))
        answered = None
        try:
            answered = stream_answer(self._opened, ids, options, keep)
        except KeyboardInterrupt:
            write(" ...")
        if self.remembers and chunks:
            self.turns += [message, {"role": "assistant", "content": "".join(chunks)}]
        return answered

    def _prompt(self, message: dict[str, str]) -> tuple[list[int], int]:
        """Return the token ids of the conversation, and the positions after it; the oldest turns may be left out."""
        form, tokenizer, positions = self.source.prompt_format, self.source.tokenizer, self._opened.max_length
        dropped = 0
        while True:
            messages = [*self.system, *self.turns, message]
            ids = form.encode(messages, tokenizer, fields=self._fields)
            room = positions - len(ids)
            if room >= min(self._options.max_new_tokens, positions // 4) or not self.turns:
                break
            del self.turns[:2]
            dropped += 1
        if dropped:
            print_status(
                f"the conversation is longer than {positions} tokens; its oldest turns are left out: {dropped}"
            )
        if room < 1:
            raise DataError(f"the message has {len(ids)} tokens, and the model takes {positions} with the answer")
        return ids, room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help=SOURCE)
    parser.add_argument(
        "--mode", choices=("attached", "detached", "base"), help="default: attached; of one model alone, its only one"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="a further field of the run's template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read messages and answer them, until the input ends."""
    check_json_target(arguments.json)
    fields = read_fields(arguments.field)
    from shadowtune.evaluation.generation import GenerationOptions

    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
    options = GenerationOptions(arguments.max_new_tokens, **sampling)
    source = open_source(arguments.source)
    source.check_generates()
    rows: list[dict[str, Any]] = []
    terminal = sys.stdin.isatty()
    with ChatSession(source, arguments.mode or source.modes[0], options, fields) as session:
        session.set_system(arguments.system)
        if terminal:
            print_status(f"{arguments.source}, {source.source.kind}, answers {session.mode}; /help shows the commands")
            if not session.remembers:
                print_status("it was trained on single requests and does not read earlier messages")
        while (line := _read(terminal)) is not None and line.strip() != "/exit":
            try:
                rows += _respond(session, line.strip())
            except ShadowtuneError as error:
                if not terminal:
                    raise
                print_status(str(error))
    write_json(arguments.json, "chat", rows)
    return 0


def _read(terminal: bool) -> str | None:
    """Return the next line of the input; None at its end. Ctrl-C at the prompt discards the line."""
    if not terminal:
        return sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing in input(), where the system has it
    try:
        return input("> ")
    except KeyboardInterrupt:
        write_text("\n")
        return ""
    except EOFError:
        write_text("\n")
        return None


def _respond(session: ChatSession, line: str) -> list[dict[str, Any]]:
    """Obey a command, or answer a message and return the answer as a row."""
    if line.startswith("/") and not line.startswith("//"):
        _obey(session, line)
        return []
    text = line.removeprefix("/") if line.startswith("//") else line
    if not text:
        return []
    answered = session.answer(text, write_text)
    write_text("\n")
    return [] if answered is None else [{"mode": session.mode, "prompt": text, **vars(answered)}]


def _obey(session: ChatSession, line: str) -> None:
    """Run a command of the conversation; raises ConfigError if there is none such."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/reset":
        session.turns = []
        print_status("the conversation begins anew")
    elif command == "/mode":
        if argument:
            session.set_mode(argument)
        print_status(f"answers {session.mode}; the modes are {', '.join(session.source.modes)}")
    elif command == "/system":
        session.set_system(argument)
        print_status("the conversation begins anew" + ("" if argument else ", without a system message"))
    elif command == "/help":
        print_status(HELP)
    else:
        raise ConfigError(f"there is no {command}; {HELP}; a message that begins with / is written with two")


CHAT = Command(add_arguments, run, EPILOG)
