"""What a reader of a comparison must know beside its numbers, a sentence each."""

from collections.abc import Sequence

from shadowtune.comparison.analysis import SMALL, Analysis, Row
from shadowtune.comparison.run import Results
from shadowtune.comparison.tables import ALL, heading_of, not_compared, rows_table, trials_table


def notes(analysis: Analysis, results: Results | None = None) -> list[str]:
    """Return the sentences on what was not equal, not met, too few or left out.

    Args:
        analysis: of the column "parameters".
        results: what else is known than rows.
    """
    said = [*_unequal_sizes(analysis), *_unequal_rows(analysis), *_costs(analysis), *_edges(analysis)]
    said += fewer_rows(analysis.rows)
    if results is not None:
        said += _missing(results)
    if small := analysis.small():
        few = ", ".join(f"{task} ({count})" for task, count in small.items())
        said.append(f"Few test rows (below {SMALL}), so only large differences can be seen: {few}.")
    return said


def _unequal_sizes(analysis: Analysis) -> list[str]:
    """Name the methods that have no size to choose, so that they do not train equally many parameters."""
    return [
        f"{name} trains {count:,} parameters and has no size to choose: its difference is not one at equal parameters, "
        "and it wins or loses nothing there."
        for name, count in analysis.unequal().items()
    ]


def _unequal_rows(analysis: Analysis) -> list[str]:
    """Say where one method reads validation rows in training and another does not."""
    found: dict[str, list[str]] = {}
    for task in dict.fromkeys(row["task"] for row in analysis.rows):
        rows = [row for row in rows_table(analysis) if row["task"] == task]
        totals = {row["method"]: row["rows in all"] for row in rows}
        readers = [row for row in rows if row["validation rows read in training"]]
        if readers and len(set(totals.values())) > 1:
            names = ", ".join(f"{row['method']} {row['validation rows read in training']}" for row in readers)
            found.setdefault(names, []).append(task)
    return [
        f"{', '.join(tasks)}: validation rows are part of some methods' training and not of others' ({names}; the "
        "others none): data are not equal. validation_rows=all gives them to every method."
        for names, tasks in found.items()
    ]


def _costs(analysis: Analysis) -> list[str]:
    """Name the runs whose measured time or memory is not what was aimed at."""
    budget, said = analysis.config.budget, []
    for column in analysis.columns:
        each = analysis.at(column)
        limit = 0.0 if budget is None else budget.measured_tolerance
        off = [row for row in each.costs() if abs(row["ratio"] - 1) > limit]
        if off:
            named = ", ".join(f"{row['task']} {row['method']} {row['ratio']:.2f}" for row in off)
            said.append(f"{heading_of(each)}: more than {limit:.0%} off as measured, times the aim: {named}.")
    if "time" in analysis.columns and analysis.config.jobs > 1:
        said.append(f"jobs={analysis.config.jobs}: runs at the same time slow one another; compare times at jobs=1.")
    return said


def _edges(analysis: Analysis) -> list[str]:
    """Name the methods whose chosen setting is the largest or smallest that was tried."""
    if analysis.config.sweep is None:
        return []
    at_edge = [f"{row['method']} ({row['chosen']})" for row in trials_table(analysis) if row["at an edge"] == "yes"]
    if not at_edge:
        return []
    return [
        f"The sweep's best is at the edge of what was tried: {', '.join(at_edge)}; a better one may lie beyond "
        "(sweep.extend)."
    ]


def fewer_rows(rows: Sequence[Row]) -> list[str]:
    """Say which tasks have fewer rows than the settings ask for."""
    found: dict[str, None] = {}
    for row in rows:
        for name, limit in (row.get("asked") or {}).items():
            count = row["training_rows"] if name == "training" else row["validation_rows"]
            if count < limit:
                found[f"{row['task']}: {count} {name} rows, fewer than the {limit} asked for."] = None
        for each in row["evaluations"]:
            limit = each.get("limit")
            if limit is not None and each["rows"] < limit:
                found[f"{each['task']}: {each['rows']} {each['split']} rows, fewer than the {limit} asked for."] = None
    return list(found)


def _missing(results: Results) -> list[str]:
    """Count what has no numbers."""
    groups: dict[tuple[str, str], list[str]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for row in not_compared(results):
        key = (row["method"], "" if row["where"] == ALL else f" at {row['where']}")
        groups.setdefault(key, []).append(row["task"])
        reasons.setdefault(key, row["why"])
    said = [
        f"Not compared: {method}{where} on {', '.join(tasks)} ({reasons[method, where]})."
        for (method, where), tasks in groups.items()
    ]
    if results.left_out:
        why = dict.fromkeys(row["why"] for row in results.left_out)
        said.append(f"{len(results.left_out)} earlier results are left out: {', '.join(why)}.")
    return said
