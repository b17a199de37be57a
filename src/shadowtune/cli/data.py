"""``shadowtune data``: the first examples of a data set as the model will see them, and counts of all."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command, add_json, check_json_target, write_json

if TYPE_CHECKING:
    from shadowtune.training.training_data import TrainingData

EPILOG = """examples:
  shadowtune data tickets.csv
  shadowtune data tickets.csv data.columns.prompt=question data.columns.completion=answer
  shadowtune data reviews.parquet task=classification --model org/name
  shadowtune data configs/clinc150.yaml --rows 5
Learned tokens are green; without colour they are between [[ and ]]. Tokens are separated by a middle dot.
"""
SHOWN = 240
"""Tokens shown of one example: the first and the last ones."""
SEPARATOR = "\u00b7"


@dataclass(frozen=True)
class ShownExample:
    """An encoded example for people."""

    row: int
    """Its line or number."""
    tokens: list[str]
    learned: list[bool]
    """Of each token, whether it is a training target."""
    label: str | None = None
    """Of a classifier, the class, the classes or the number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", help="data set as in data.train; or a run directory, or a YAML file with settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of a run, such as data.template")
    parser.add_argument("--model", metavar="M", help="model whose tokenizer is used (default: smollm2-135m)")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="examples to show (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encode as training does, and print the counts and the first examples."""
    check_json_target(arguments.json)
    from shadowtune.config.loading import load_config
    from shadowtune.config.training import TrainConfig

    run_settings = Path(arguments.file) / "config.yaml"
    file = run_settings if run_settings.is_file() else Path(arguments.file)
    settings = file if file.suffix in (".yaml", ".yml") else None
    named = [] if settings is not None else [f"data.train={arguments.file}"]
    named += [] if arguments.model is None else [f"model={arguments.model}"]
    config = load_config(TrainConfig, settings, [*named, *arguments.overrides])
    from shadowtune.training.training_data import load_training_data

    data = load_training_data(config)
    examples = [show_example(example, data) for example in data.train[: max(arguments.rows, 0)]]
    counts = count(data)
    _print(config.data.source, data, counts, examples)
    write_json(arguments.json, "data", [vars(example) for example in examples], counts=counts)
    return 0


def show_example(example: Mapping[str, Any], data: "TrainingData") -> ShownExample:
    """Return an encoded example as texts of its tokens."""
    ids, labels = list(example["input_ids"]), example["labels"]
    tokens = [_token_text(data.tokenizer, token) for token in ids]
    if data.labels is None:
        learned = [False, *(label >= 0 for label in list(labels)[1:])]  # no token predicts the first
        return ShownExample(example["row"], tokens, learned)
    if isinstance(labels, list):
        label = ", ".join(data.labels.name(number) for number, value in enumerate(labels) if value)
    else:
        label = data.labels.name(labels) if isinstance(labels, int) else f"{labels:g}"
    return ShownExample(example["row"], tokens, [False] * len(tokens), label)


def count(data: "TrainingData") -> dict[str, Any]:
    """Return counts of all examples."""
    report = vars(data.report)
    names = ("examples", "documents", "blocks", "tokens", "labelled_tokens", "longest", "truncated", "dropped")
    counts: dict[str, Any] = {name: report[name] for name in names if name in report}
    counts |= {"validation": None if data.validation is None else len(data.validation)}
    return counts | {"formats": data.formats, "unread": list(data.unread)}


def _token_text(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if not text or "\ufffd" in text else text


def _print(source: str, data: "TrainingData", counts: Mapping[str, Any], examples: Sequence[ShownExample]) -> None:
    from rich.console import Console

    from shadowtune.data.formats import describe_unread

    console = Console(soft_wrap=True, highlight=False, markup=False, no_color="NO_COLOR" in os.environ or None)
    coloured = console.is_terminal and not console.no_color
    console.print(f"{source}: read as {data.formats}" if data.formats else source)
    console.print(str(data.report))
    if counts["unread"]:
        console.print(f"no setting reads {describe_unread(counts['unread'])}")
    for example in examples:
        learned = sum(example.learned)
        title = f"label: {example.label}" if example.label is not None else f"{learned} learned"
        console.print(f"\nrow {example.row}: {len(example.tokens)} tokens, {title}")
        console.print(_text(example, coloured))
    sys.stdout.flush()


def _text(example: ShownExample, coloured: bool) -> Any:
    """Return the tokens of an example in colours, or with marks around the learned ones."""
    from rich.text import Text

    text, before = Text(), False
    total = len(example.tokens)
    hidden = range(SHOWN // 2, total - SHOWN // 2) if total > SHOWN else range(0)
    for index, (token, learned) in enumerate(zip(example.tokens, example.learned, strict=True)):
        if index in hidden:
            if index == hidden.start:
                text.append(f"{']]' if before and not coloured else ''}\n... {len(hidden):,} tokens ...\n")
                before = False
            continue
        shown = token.replace("\n", "\\n\n") if token.strip("\n") or not token else "\\n" * len(token) + "\n"
        if not coloured and learned != before:
            text.append("[[" if learned else "]]")
        elif index and index - 1 not in hidden:
            text.append(SEPARATOR, "dim" if coloured else None)
        text.append(shown, "bold green" if coloured and learned else None)
        before = learned
    return text.append("]]") if before and not coloured else text


DATA = Command(add_arguments, run, EPILOG)
