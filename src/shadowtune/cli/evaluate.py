"""``shadowtune evaluate``."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from shadowtune.cli.command import Command, ProgressBar, add_json, check_json_target, print_table, write_json
from shadowtune.cli.options import add_speculation, speculation_of
from shadowtune.cli.source import SOURCE, open_source

EPILOG = """examples:
  shadowtune evaluate runs/clinc150
  shadowtune evaluate runs/clinc150 --mode all --json result.json
  shadowtune evaluate runs/mine --data held-out.jsonl --predictions answers.jsonl
  shadowtune evaluate mine-q8_0.gguf --data held-out.jsonl
  shadowtune evaluate runs/gsm8k --split validation --limit 200
  shadowtune evaluate runs/gsm8k --mode attached --speculate --batch-size 1
  shadowtune evaluate runs/gsm8k --task squad_v2 --data directory-of-data-sets
"""
LISTS = ("scores", "predictions", "answers", "other_scores")
"""Fields of an evaluation that are left out of the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("--mode", default="all", choices=("attached", "detached", "base", "all"), help="default: all")
    parser.add_argument("--data", help="test examples; with a task, a directory of data sets; default: a run's")
    parser.add_argument("--task", help="a task other than that of training: a name, or a .yaml file")
    parser.add_argument("--split", default="test", help="split of the data set, or part of the task (default: test)")
    parser.add_argument("--limit", type=int, help="most examples: the first ones; of a task, a random sample")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, help="default: the task's, or enough for the longest true answer")
    parser.add_argument("--ignore-base-weights", action="store_true", help="accept a base with other weights")
    parser.add_argument(
        "--quantization", choices=("none", "int8", "int4", "nf4"), help="of the base; default: as trained"
    )
    add_speculation(parser)
    parser.add_argument("--predictions", metavar="FILE", help="write the answers to each example as JSONL")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate each mode, print one table; the other modes are compared with the attached one."""
    check_json_target(arguments.json)
    check_json_target(arguments.predictions)
    opened = open_source(arguments.source, not arguments.ignore_base_weights, arguments.quantization)
    speculate = speculation_of(arguments, opened)
    modes = opened.modes if arguments.mode == "all" else (arguments.mode,)
    rows: list[dict[str, Any]] = []
    answers: dict[str, list[str]] = {}
    attached = None
    for mode in modes:
        result = _evaluate(opened, mode, arguments, attached, speculate)
        answers[mode] = result.predictions
        if mode == "attached":
            attached = result.answers
        kept = ("agreement",) if len(modes) > 1 else ()  # None in the first row
        fields = vars(result).items()
        cells = {name: value for name, value in fields if name not in LISTS and (value is not None or name in kept)}
        rows.append({"run": arguments.source, **_method(opened), "mode": mode, **cells, **result.other_scores})
    print_table(f"Evaluated: {arguments.source}", rows)
    write_json(arguments.json, "evaluate", rows)
    if arguments.predictions:
        _write_predictions(arguments.predictions, answers)
    return 0


def _method(opened: Any) -> dict[str, str]:
    """Return the method that a run was trained by; files alone do not have it."""
    from shadowtune.evaluation.run import FinishedRun

    return {"method": opened.config.method} if isinstance(opened, FinishedRun) else {}


def _evaluate(opened: Any, mode: str, arguments: argparse.Namespace, attached: Any, speculate: Any) -> Any:
    with ProgressBar(arguments.quiet) as bar:
        return opened.evaluate(
            mode,
            arguments.data,
            arguments.split,
            arguments.limit,
            arguments.task,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            progress=partial(bar.show, f"evaluate {mode}"),
            compare_with=attached,
            speculate=speculate,
        )


def _write_predictions(file: str, answers: dict[str, list[str]]) -> None:
    modes = list(answers)
    lines = [
        json.dumps({"row": i, **dict(zip(modes, row, strict=True))})
        for i, row in enumerate(zip(*answers.values(), strict=True))
    ]
    Path(file).write_text("".join(f"{line}\n" for line in lines))


EVALUATE = Command(add_arguments, run, EPILOG)
