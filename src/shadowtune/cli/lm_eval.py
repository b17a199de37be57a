"""``shadowtune lm-eval``."""

import argparse
from typing import Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_table, write_json
from shadowtune.cli.source import SOURCE, open_source

EPILOG = """examples:
  shadowtune lm-eval runs/clinc150 --tasks arc_easy,hellaswag --limit 100
  shadowtune lm-eval runs/clinc150 --tasks mmlu --mode detached --num-fewshot 5
  shadowtune lm-eval my-name/clinc150 --tasks mmlu --mode attached
  shadowtune lm-eval runs/clinc150 --tasks my_task --include-path my-tasks
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", help=SOURCE)
    parser.add_argument("--tasks", required=True, help="tasks or groups of the harness, separated by commas")
    parser.add_argument("--mode", default="all", choices=("attached", "detached", "base", "all"), help="default: all")
    parser.add_argument("--limit", type=int, help="most examples of each task, the first ones")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-fewshot", type=int, help="examples in each prompt (default: the task's)")
    parser.add_argument("--include-path", metavar="DIR", help="a directory with task files of your own")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate each mode, print one table."""
    check_json_target(arguments.json)
    from shadowtune.evaluation.harness import evaluate_with_harness

    source = open_source(arguments.run)
    rows: list[dict[str, Any]] = []
    for mode in source.modes if arguments.mode == "all" else (arguments.mode,):
        found = evaluate_with_harness(
            source,
            mode,
            arguments.tasks.split(","),
            arguments.limit,
            arguments.batch_size,
            arguments.num_fewshot,
            arguments.include_path,
        )
        rows += [{"mode": mode, **row} for row in found]
    print_table(f"lm-evaluation-harness: {arguments.run}", rows)
    write_json(arguments.json, "lm-eval", rows)
    return 0


LM_EVAL = Command(add_arguments, run, EPILOG)
