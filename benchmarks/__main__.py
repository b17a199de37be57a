"""Command line of the benchmarks: ``python -m benchmarks NAME``; exit code 2 with one line on an error."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from benchmarks.benchmark import Benchmark
from benchmarks.detached import DETACHED
from benchmarks.generation import DECODE, EVALUATE
from benchmarks.operations import BOUNDARY, HEAD
from benchmarks.planning import PLAN
from benchmarks.prefix import PREFIX
from benchmarks.result_files import ResultFiles, readable, title
from benchmarks.runner import run_benchmark
from benchmarks.serving import SERVING
from benchmarks.speculation import PASSES, SPECULATE
from benchmarks.training import MEMORY, SCALING, TRAIN
from shadowtune.cli.command import ProgressBar, check_json_target, print_status, print_table, write_json
from shadowtune.errors import ShadowtuneError
from shadowtune.provenance import provenance

BENCHMARKS: dict[str, Benchmark] = {
    bench.name: bench
    for bench in (
        *(TRAIN, BOUNDARY, HEAD, DECODE, EVALUATE, SPECULATE, PASSES),
        *(SERVING, PREFIX, DETACHED, MEMORY, SCALING, PLAN),
    )
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser: a subcommand for each benchmark, an option for each of its settings."""
    parser = _Parser(prog="python -m benchmarks", description="Measure shadowtune against other methods.")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    where = "directory of NAME.csv and NAME.md, to which the results are appended (default: %(default)s)"
    for name, bench in BENCHMARKS.items():
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=bench.help, description=bench.help, epilog=bench.examples, formatter_class=raw
        )
        for field in dataclasses.fields(bench.settings):
            shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            command.add_argument(
                f"--{field.name.replace('_', '-')}",
                default=field.default,
                type=field.metadata["parse"],
                metavar="VALUE",
                help=field.metadata["help"] + ("" if shown is None else f" (default: {shown})"),
            )
        command.add_argument("--out", default="benchmarks/results", metavar="DIR", help=where)
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        command.add_argument("--json", metavar="FILE", help="also write the result as one JSON object to FILE")
    return parser


def run(bench: Benchmark, arguments: argparse.Namespace) -> None:
    """Measure, append the rows to the result files and print one table."""
    check_json_target(arguments.json)
    names = [field.name for field in dataclasses.fields(bench.settings)]
    settings = bench.settings(**{name: vars(arguments)[name] for name in names})
    plan = bench.plan(settings)
    files, origin = ResultFiles(arguments.out, bench), provenance()
    rows: list[dict[str, Any]] = []
    with ProgressBar(arguments.quiet) as bar:
        for case_rows in run_benchmark(bench, settings, plan, bar.show):
            files.add_rows(case_rows, origin)
            rows += case_rows
    files.add_table(rows, origin)
    print_table(title(bench, rows), readable(bench, rows))
    print_status(f"rows appended to {files.csv}, a table to {files.markdown}")
    if bench.draw is not None:
        bench.draw(rows, files.picture)
        print_status(f"a figure of this run in {files.picture}")
    write_json(arguments.json, "bench", rows)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        run(BENCHMARKS[arguments.benchmark], arguments)
    except ShadowtuneError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
