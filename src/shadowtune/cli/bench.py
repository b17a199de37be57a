"""``shadowtune bench WHAT``, a verb for each benchmark."""

import argparse
import dataclasses
from functools import partial
from typing import Any

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.registry import BENCHES
from shadowtune.cli.command import Command, add_json
from shadowtune.cli.output import ProgressBar, check_json_target, print_table, say, write_json


def add_arguments(bench: Bench, parser: argparse.ArgumentParser) -> None:
    """Declare the options that the benchmark's settings name, and where the results go."""
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


def run(bench: Bench, arguments: argparse.Namespace) -> int:
    """Measure, keep the rows, print one table."""
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
    Command(f"bench {bench.name}", bench.help, partial(add_arguments, bench), partial(run, bench), bench.examples)
    for bench in BENCHES.values()
]
