"""``shadowtune compare``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shadowtune.cli.command import Command, add_json
from shadowtune.cli.output import check_json_target, print_table, say, write_json
from shadowtune.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from shadowtune.comparison.plan import Plan

EPILOG = """examples:
  shadowtune compare configs/compare/quick.yaml
  shadowtune compare configs/compare/quick.yaml --dry-run
  shadowtune compare configs/compare/users.yaml tasks.mine.data.train=train.jsonl tasks.mine.test=test.jsonl
  shadowtune compare configs/compare/paper.yaml --data DIR 'seeds=[1, 2]' jobs=2 'devices=[0, 1]'

The same command again goes on where it was interrupted, and repeats no run whose settings have not changed.
With --report it says what is known so far.
"""

SHOWN = ("task", "method", "accuracy %", "95 % interval", "rows x seeds", "trained", "training s", "memory MB")
"""Columns that fit on a terminal; the report has the rest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML file with tasks and methods")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--data", metavar="DIR", help="directory of local data for the tasks; default: from the Hub")
    parser.add_argument("--dry-run", action="store_true", help="show the plan with its sizes, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what is done, and run nothing")
    parser.add_argument("--quiet", action="store_true", help="do not say what is being done")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plan, run what has not been run, report."""
    check_json_target(arguments.json)
    from shadowtune.config.comparison import CompareConfig
    from shadowtune.config.loading import load_config

    overrides = [*arguments.overrides, *([] if arguments.data is None else [f"directory={arguments.data}"])]
    config = load_config(CompareConfig, arguments.config, overrides)
    from shadowtune.comparison.plan import Plan

    plan = Plan.of(config)
    if arguments.dry_run:
        _show(plan)
        write_json(arguments.json, "compare", plan.rows())
        return 0
    from shadowtune.comparison.run import compare, failures, rows_done

    results = rows_done(plan) if arguments.report else compare(plan, (lambda line: None) if arguments.quiet else say)
    rows = results.rows
    if not rows:
        raise ConfigError(f"no run in {config.output} is done with these settings; leave out --report to do them")
    from shadowtune.comparison.analysis import Analysis
    from shadowtune.comparison.report import write_report
    from shadowtune.comparison.tables import heading_of, results_table

    analysis, output = Analysis(config, rows), Path(config.output)
    said = write_report(analysis, output, results)
    for column in analysis.columns or (["parameters"] if analysis.rows else []):
        each = analysis.at(column)
        shown = [{key: row[key] for key in SHOWN} for row in results_table(each)]
        print_table("Results" if len(analysis.columns) < 2 else f"Results, {heading_of(each)}", shown)
    for sentence in said:
        print(sentence)
    write_json(arguments.json, "compare", analysis.summary(), differences=analysis.differences())
    say(f"look at: {output / 'report.html'}  {output / 'report.md'}  {output / 'results.jsonl'}")
    if failed := failures(rows):
        raise TrainingError(
            f"{len(failed)} of {len(rows)} runs failed, the first one ({failed[0]['run']}) because: "
            f"{failed[0]['error']}; the same command tries them again"
        )
    _check_refused(plan)
    return 0


def _check_refused(plan: "Plan") -> None:
    """Raise TrainingError if a method cannot be compared on a task, after everything else has been done."""
    if refused := plan.refused():
        first = refused[0]
        raise TrainingError(f"{first['method']} cannot be compared on {first['task']}: {first['why']}")


def _show(plan: "Plan") -> None:
    """Print what would be run."""
    print_table(f"Plan: {plan.config.output}", plan.rows())
    trials, finals = plan.trials(), plan.finals()
    evaluations = sum(len(job.requests) for job in finals)
    print(f"{len(trials)} trials on validation rows, then {len(finals)} runs with {evaluations} evaluations")


COMMAND = Command("compare", "compare methods on tasks: equal budgets, intervals, a report", add_arguments, run, EPILOG)
