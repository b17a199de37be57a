"""``shadowtune compare``."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.errors import ConfigError, TrainingError
from shadowtune.tables import duration

if TYPE_CHECKING:
    from shadowtune.comparison.plan import Plan

EPILOG = """examples:
  shadowtune compare configs/compare/quick.yaml
  shadowtune compare configs/compare/quick.yaml --dry-run
  shadowtune compare configs/compare/users.yaml tasks.mine.data.train=train.jsonl tasks.mine.test=test.jsonl
  shadowtune compare configs/compare/paper.yaml --data DIR 'seeds=[1, 2]' jobs=2 'devices=[0, 1]'

The same command again continues an interrupted comparison, and repeats no run whose settings have not changed.
--report writes the report of the finished runs.
"""

SHOWN = ("task", "method", "accuracy %", "95 % interval", "rows x seeds", "trained", "training s", "memory MB")
"""Columns of the table on the terminal; the report has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML file with tasks and methods")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--data", metavar="DIR", help="directory of local data for the tasks; default: from the Hub")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan with sizes and estimated time, and run nothing"
    )
    parser.add_argument("--report", action="store_true", help="write the report of the finished runs, and run nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plan, do the missing runs, report."""
    check_json_target(arguments.json)
    from shadowtune.config.comparison import CompareConfig
    from shadowtune.config.loading import load_config

    overrides = [*arguments.overrides, *([] if arguments.data is None else [f"directory={arguments.data}"])]
    config = load_config(CompareConfig, arguments.config, overrides)
    from shadowtune.comparison.plan import Plan

    plan = Plan.of(config)
    if arguments.dry_run:
        write_json(arguments.json, "compare", _show(plan))
        _check_refused(plan)
        return 0
    from shadowtune.comparison.run import compare, failures, rows_done

    report = (lambda line: None) if arguments.quiet else print_status
    results = rows_done(plan) if arguments.report else compare(plan, report)
    rows = results.rows
    if not rows:
        raise ConfigError(f"no run in {config.output} is done with these settings; leave out --report to do them")
    from shadowtune.comparison.analysis import Analysis
    from shadowtune.comparison.report import write_report
    from shadowtune.comparison.tables import heading_of, results_table

    analysis, output = Analysis(config, rows), Path(config.output)
    sentences = write_report(analysis, output, results)
    for column in analysis.columns or (["parameters"] if analysis.rows else []):
        each = analysis.at(column)
        shown = [{key: row[key] for key in SHOWN} for row in results_table(each)]
        print_table("Results" if len(analysis.columns) < 2 else f"Results, {heading_of(each)}", shown)
    for sentence in sentences:
        print(sentence)
    write_json(arguments.json, "compare", analysis.summary(), differences=analysis.differences())
    print_status(f"look at: {output / 'report.html'}  {output / 'report.md'}  {output / 'results.jsonl'}")
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


def _show(plan: "Plan") -> list[dict[str, Any]]:
    """Print the runs and their estimated time; return the table. Test examples are not read."""
    from shadowtune.comparison.estimate import TimeEstimate
    from shadowtune.comparison.job import RowDigests
    from shadowtune.comparison.run import rows_on_disk

    plan = replace(plan, digests=RowDigests(held_out=False))
    estimate, rows, unknown, total = TimeEstimate(plan, rows_on_disk(plan)), [], False, 0.0
    for row in plan.rows():
        known = {stage: estimate.seconds(row["task"], row["method"], stage) for stage in ("trial", "final")}
        needed = [(row["trials"], known["trial"]), (row["runs"], known["final"])]
        seconds = [count * each for count, each in needed if count and each is not None]
        unknown |= any(count and each is None for count, each in needed)
        total += sum(seconds)
        rows.append({**row, "minutes": f"{sum(seconds) / 60:.1f}" if seconds else None})
    print_table(f"Plan: {plan.config.output}", rows)
    trials = sum(row["trials"] for row in rows)
    finals = plan.finals()
    evaluations = sum(len(job.requests) for job in finals)
    print(f"{trials} trials on validation examples, then {len(finals)} runs with {evaluations} evaluations")
    for line in _further_runs(plan):
        print(line)
    where = "on this machine" if plan.config.cluster is None else "on machines as fast as this one"
    time = f"about {duration(total / plan.config.jobs)} {where}, roughly, before runs at equal time and memory"
    print(time + ("; tasks whose data cannot be read are not included" if unknown else ""))
    return rows


def _further_runs(plan: "Plan") -> list[str]:
    """Describe the trials and runs whose number depends on results."""
    sweep, budget, methods = plan.config.sweep, plan.config.budget, len(plan.config.trained_methods)
    lines = []
    if sweep is not None and sweep.extend:
        most = sweep.extend * methods * len(plan.config.tuning_tasks)
        lines.append(f"up to {most} trials more, where the best is at the edge of a grid")
    columns = [name for name in ("time", "memory") if budget is not None and vars(budget)[name] is not None]
    if columns:
        most = len(columns) * (methods - 1) * len(plan.config.seeds) * len(plan.config.chosen_tasks)
        lines.append(f"up to {most} runs more, at equal {' and '.join(columns)}")
    return lines


COMPARE = Command(add_arguments, run, EPILOG)
