"""``shadowtune bench WHAT``, a verb for each benchmark."""

import argparse
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command, add_json
from shadowtune.cli.output import ProgressBar, check_json_target, print_table, say, write_json

if TYPE_CHECKING:
    from shadowtune.benchmark.bench import Bench

HELP = {
    "train": "a full training step: tokens per second and peak memory",
    "boundary": "one boundary between two blocks: crossings per second, and how near the memory's limit",
    "head": "the joint loss behind the head, with its gradients: one sweep against all logits",
    "decode": "greedy generation with a cache: new tokens per second",
    "evaluate": "answers to held-out prompts, in batches and one at a time: tokens per second",
    "speculate": "drafts of the shadow against plain decoding: new tokens per second",
    "passes": "a pass over a few tokens, and a draft of as many: tokens per second",
    "serving": "many streams at once, of one adapter and of several: new tokens per second",
    "detached": "the shadow alone in each exported format: speed, memory, size on disk",
    "memory": "peak memory of a training step and of reading a prompt, above the loaded model",
    "scaling": "a training step's time and memory over tokens, depth and rank, with a picture",
}
"""What each benchmark measures. Stated here too, so that ``shadowtune --help`` need not import them."""


def load(name: str) -> "Bench":
    """Import a benchmark."""
    from shadowtune.benchmark.registry import BENCHES

    return BENCHES[name]


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the options that the benchmark's settings name, and where the results go."""
    bench = load(name)
    parser.epilog = bench.examples
    for field in dataclasses.fields(bench.settings):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            type=field.metadata["parse"],
            metavar="VALUE",
            help=field.metadata["help"] + ("" if shown is None else f" (default: {shown})"),
        )
    where = "directory of NAME.csv and NAME.md, to which the results are added (default: %(default)s)"
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR", help=where)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)


def run(name: str, arguments: argparse.Namespace) -> int:
    """Measure, keep the rows, print one table."""
    bench = load(name)
    check_json_target(arguments.json)
    from shadowtune.benchmark.results import ResultFiles
    from shadowtune.benchmark.rows import for_people, title
    from shadowtune.benchmark.runner import run_bench
    from shadowtune.provenance import provenance

    names = [field.name for field in dataclasses.fields(bench.settings)]
    settings = bench.settings(**{name: vars(arguments)[name] for name in names})
    plan = bench.plan(settings)
    files, origin = ResultFiles(arguments.out, bench), provenance()
    rows: list[dict[str, Any]] = []
    with ProgressBar(arguments.quiet) as bar:
        for case_rows in run_bench(bench, settings, plan, bar.show):
            files.add_rows(case_rows, origin)
            rows += case_rows
    files.add_table(rows, origin)
    print_table(title(bench, rows), for_people(bench, rows))
    say(f"rows added to {files.csv}, a table to {files.markdown}")
    if bench.draw is not None:
        bench.draw(rows, files.picture)
        say(f"a picture of this run in {files.picture}")
    write_json(arguments.json, "bench", rows)
    return 0


COMMANDS = [
    Command(f"bench {name}", summary, partial(add_arguments, name), partial(run, name))
    for name, summary in HELP.items()
]
