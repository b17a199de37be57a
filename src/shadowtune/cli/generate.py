"""``shadowtune generate``."""

import argparse
import contextlib
import sys

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, write_json
from shadowtune.cli.options import add_speculation, speculation_of
from shadowtune.cli.source import SOURCE, open_source
from shadowtune.errors import ConfigError

EPILOG = """examples:
  shadowtune generate runs/clinc150 "wake me at six"
  shadowtune generate runs/clinc150 --mode detached --max-new-tokens 8 - < request.txt
  shadowtune generate clinc150-q8_0.gguf --lines --json answers.json < requests.txt
  shadowtune generate runs/gsm8k "Tom has 3 apples and buys 4 more. How many?" --speculate
  shadowtune generate runs/alpaca --field instruction="Translate to French" --field input="good morning"
  (a number after --speculate is not a prompt: write the prompt first, or --speculate=4)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help=SOURCE)
    parser.add_argument(
        "prompt", nargs="*", help="one or more prompts; - or none reads one from standard input, all lines of it"
    )
    parser.add_argument("--lines", action="store_true", help="each line of standard input is a prompt of its own")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the run's template; a prompt fills its main field",
    )
    parser.add_argument(
        "--mode", choices=("attached", "detached", "base"), help="default: attached; of one model alone, its only one"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    add_speculation(parser)
    parser.add_argument("--raw", action="store_true", help="do not apply the run's template to prompts")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer each prompt, streaming the tokens."""
    check_json_target(arguments.json)
    fields = read_fields(arguments.field)
    if fields and arguments.raw:
        raise ConfigError("--raw takes whole prompts, and --field parts of one; leave one of them out")
    prompts: list[str | None] = [*_prompts(arguments, bool(fields))]
    from shadowtune.core.prepacked_linear import prepacked_linear
    from shadowtune.evaluation.generation import GenerationOptions, generate_answer
    from shadowtune.export.loading import LoadedModel

    opened = open_source(arguments.source)
    opened.check_generates()
    mode, form = arguments.mode or opened.modes[0], opened.prompt_format
    speculate = speculation_of(arguments, opened)
    if speculate is not None and mode != "attached":
        raise ConfigError(f"--speculate is for --mode attached, got {mode}; leave one of them out")
    limits = (arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.num_beams, arguments.seed)
    sampling = GenerationOptions(*limits, speculate)
    rows = []
    with opened.mode(mode) as model, contextlib.ExitStack() as stack:
        if not isinstance(model, LoadedModel):
            stack.enter_context(prepacked_linear(model))  # nothing trains in this process
        for prompt in prompts:
            text = prompt if arguments.raw and prompt is not None else opened.prompt(prompt, fields)
            answered = generate_answer(model, opened.tokenizer, text, sampling, stream=write_text, prompt_format=form)
            write_text("\n")
            if answered.tokens_per_pass is not None:
                speed = f"{answered.tokens_per_second:.1f} tokens/s"
                print_status(f"{answered.new_tokens} tokens, {answered.tokens_per_pass:.2f} a pass, {speed}")
            rows.append({"mode": mode, "prompt": text, **vars(answered)})
    write_json(arguments.json, "generate", rows)
    return 0


def _prompts(arguments: argparse.Namespace, has_fields: bool) -> list[str] | list[None]:
    """Return the prompts of the arguments or of standard input; None stands for one of fields alone."""
    words = [word for word in arguments.prompt if word != "-"]
    if arguments.lines:
        if words:
            raise ConfigError("--lines reads prompts from standard input; leave the others out")
        return read_lines()
    if len(words) < len(arguments.prompt) and len(arguments.prompt) > 1:
        raise ConfigError("- reads one prompt from standard input; leave the other prompts out")
    if words:
        return words
    return [None] if has_fields and not arguments.prompt else [sys.stdin.read()]


def read_lines() -> list[str]:
    """Return the lines of standard input that are not blank; raises ConfigError if there are none."""
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise ConfigError("standard input has no lines")
    return lines


def read_fields(given: list[str]) -> dict[str, str]:
    """Return fields by their names; raises ConfigError if one is not NAME=VALUE, or is given twice."""
    fields: dict[str, str] = {}
    for pair in given:
        name, separator, value = pair.partition("=")
        if not name or not separator:
            raise ConfigError(f"--field takes NAME=VALUE, got {pair!r}")
        if name in fields:
            raise ConfigError(f"--field {name} is given twice; give it once")
        fields[name] = value
    return fields


def write_text(text: str) -> None:
    """Write a piece of an answer to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


GENERATE = Command(add_arguments, run, EPILOG)
