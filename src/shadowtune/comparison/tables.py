"""Tables of a comparison's report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shadowtune.comparison.analysis import Analysis
from shadowtune.comparison.budgets import COLUMNS
from shadowtune.comparison.run import Results

Row = Mapping[str, Any]
Table = list[dict[str, Any]]
ALL = "everywhere"
"""Value of "where" for a method that cannot be compared at all."""
UNEQUAL = {
    "parameters": "the same passes, each method at its own size",
    "time": COLUMNS["time"],
    "memory": COLUMNS["memory"],
}
"""Headings of the columns where no sizes were chosen."""


def heading_of(analysis: Analysis) -> str:
    """Return the heading of an analysis' column: what is equal in it."""
    budget = analysis.config.budget
    return (COLUMNS if budget is not None and budget.equal_parameters else UNEQUAL)[analysis.column]


def tables_of(analysis: Analysis, results: Results | None = None) -> dict[str, Table]:
    """Return the tables of the report by heading; those without rows are left out.

    Args:
        analysis: of the column "parameters".
        results: of the comparison, for what is not in the rows.
    """
    swept = analysis.config.sweep is not None
    columns = [analysis.at(column) for column in analysis.columns] or [analysis]
    several = len(columns) > 1
    tables: dict[str, Table] = {"What each method wins": standings_table(columns)} if several else {}
    for each in columns:
        suffix = f", {heading_of(each)}" if several else ""
        tables[f"Results{suffix}"] = results_table(each)
        tables[f"Against the best of the others{suffix}"] = [_difference(row) for row in each.against_best()]
        tables[f"Differences{suffix}"] = [_difference(row) for row in each.differences()]
    tables["Forgetting"] = forgetting_table(analysis)
    tables["Trials of the sweep"] = trials_table(analysis) if swept else []
    settings = _settings(analysis.rows, swept)
    tables["Settings that the sweep chose" if swept else "Sizes that the budget chose"] = settings
    tables["Rows that each method learns from"] = rows_table(analysis)
    if results is not None:
        tables["Not compared"] = not_compared(results)
        tables["Earlier results left out"] = list(results.left_out)
    tables["Failed runs"] = [{"run": row["run"], "why": row["error"]} for row in analysis.failed]
    return {heading: rows for heading, rows in tables.items() if rows}


def results_table(analysis: Analysis) -> Table:
    """Return a row for each task, method and mode."""
    ratios = {(row["task"], row["method"]): row["ratio"] for row in analysis.costs()}
    return [_result(row, analysis.column, ratios) for row in analysis.summary()]


def standings_table(columns: Sequence[Analysis]) -> Table:
    """Return a row for each method: its standing in each column."""
    words: dict[str, dict[str, str]] = {}
    for each in columns:
        for method, count in each.unequal().items():
            words.setdefault(method, {})[heading_of(each)] = f"not equal: {count:,} parameters"
        for row in each.standings():
            words.setdefault(row["method"], {})[heading_of(each)] = standing(row)
    return [
        {"method": method, **{heading_of(each): own.get(heading_of(each), "not compared") for each in columns}}
        for method, own in words.items()
    ]


def standing(row: Row) -> str:
    """Describe a method's difference to the best of the others."""
    word = {"better": "wins", "worse": "loses"}.get(row["outcome"], "undecided")
    return f"{word}: {row['points']:+.1f} ({row['points_low']:+.1f} to {row['points_high']:+.1f}) over {row['against']}"


def not_compared(results: Results) -> Table:
    """Return a row for each method without results on a task, with the reason."""
    refused = [
        {"task": row["task"], "method": row["method"], "where": ALL, "why": row["why"]} for row in results.refused
    ]
    unmet = [
        {"task": each.task, "method": each.method, "where": COLUMNS[each.column], "why": each.why}
        for each in results.unmet
    ]
    return [*refused, *unmet]


def forgetting_table(analysis: Analysis) -> Table:
    """Return a row for each task and method: the perplexity of the text before training and after."""
    rows = [row for row in analysis.summary() if row["text_loss"] is not None]
    return [
        {
            "trained on": row["task"],
            "method": row["method"],
            "accuracy %": f"{100 * row['accuracy']:.1f}",
            "perplexity before": f"{_perplexity(row['text_loss_before']):.2f}",
            "after": f"{_perplexity(row['text_loss']):.2f}",
            "rise of the loss": f"{row['text_loss'] - row['text_loss_before']:+.3f}",
            "seeds": row["seeds"],
        }
        for row in rows
    ]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond it a float overflows


def trials_table(analysis: Analysis) -> Table:
    """Return a row for each method and group of tuning tasks: settings, numbers of trials, accuracies, the choice."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in analysis.trials:
        tasks = "all" if analysis.config.sweep is not None and analysis.config.sweep.tasks is not None else row["task"]
        groups.setdefault((tasks, row["method"]), []).append(row)
    return [_trials_row(tasks, method, rows, analysis) for (tasks, method), rows in groups.items()]


def _trials_row(tasks: str, method: str, rows: Sequence[Row], analysis: Analysis) -> dict[str, Any]:
    """The row of one method in ``trials_table``."""
    tried = list({_setting(row): row["setting"] for row in rows}.values())
    numbers = sorted(value for setting in tried for value in setting.values() if isinstance(value, int | float))
    used = {_setting(row): row["setting"] for row in analysis.rows if row["method"] == method}
    found = {
        "tasks": tasks if tasks != "all" else ", ".join(dict.fromkeys(row["task"] for row in rows)),
        "method": method,
        "settings tried": len(tried),
        "beyond the grid": max(0, len(tried) - len(analysis.config.trials(method))),
        "trials": len(rows),
        "failed": sum(bool(row["error"]) for row in rows),
    }
    found["accuracy % by setting"] = "; ".join(_accuracies(setting, rows) for setting in sorted(tried, key=_order))
    chosen = next(iter(used.values()), None) if len(used) == 1 else None
    value = next(iter(chosen.values()), None) if chosen else None
    edge = len(numbers) > 1 and isinstance(value, int | float) and float(value) in (numbers[0], numbers[-1])
    return {**found, "chosen": next(iter(used)) if chosen else None, "at an edge": "yes" if edge else "no"}


def _order(setting: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
    """Sort key of a setting: its numbers first."""
    values = [_number(value) for value in setting.values()]
    return [(not isinstance(value, float), value if isinstance(value, float) else 0.0, str(value)) for value in values]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _accuracies(setting: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """Format a setting with its mean accuracy over its trials."""
    own = [row for row in rows if row["setting"] == setting]
    found = [100 * row["evaluations"][0]["accuracy"] for row in own if not row["error"]]
    mean = f"{sum(found) / len(found):.1f}" if found else "failed"
    count = f" ({len(found)})" if len(own) > 1 else ""
    return f"{', '.join(map(str, setting.values()))}: {mean}{count}"


def rows_table(analysis: Analysis) -> Table:
    """Return a row for each task and method: numbers of training examples and of validation examples in training."""
    found = {}
    for row in analysis.rows:
        if row["training"] is not None and "training_rows" in row:
            found[row["task"], row["method"]] = {
                "task": row["task"],
                "method": row["method"],
                "training rows": row["training_rows"],
                "validation rows read in training": row["validation_rows"],
                "rows in all": row["training_rows"] + row["validation_rows"],
            }
    return list(found.values())


def _result(row: Row, column: str, ratios: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    percent = [100 * row[name] for name in ("accuracy", "accuracy_low", "accuracy_high")]
    found = {
        "task": row["task"],
        "method": row["method"] + (" detached" if row["mode"] == "detached" else ""),
        "accuracy %": f"{percent[0]:.1f}",
        "95 % interval": f"{percent[1]:.1f} to {percent[2]:.1f}",
        "F1 %": "-" if row.get("f1") is None else f"{100 * row['f1']:.1f}",
        "loss": row["loss"],
        "of attached": row["of_attached"],
        "agrees with attached": row["agreement"],
        "rows x seeds": f"{row['test_rows']} x {row['seeds']}",
        "trained": None if row["trainable_parameters"] is None else f"{row['trainable_parameters']:,.0f}",
        "steps": row["steps"],
        "training s": row["train_seconds"],
        "tokens/s": row["tokens_per_second"],
        "memory MB": row["peak_memory_mb"],
        "answers, tokens/s": row["answer_tokens_per_second"],
        "s/answer": row["answer_seconds"],
    }
    if column != "parameters":
        ratio = ratios.get((row["task"], row["method"]))
        found[f"of the {column} aimed at"] = None if ratio is None else f"{ratio:.2f}"
    return found


def _difference(row: Row) -> dict[str, Any]:
    mode = {"mode": row["mode"]} if "mode" in row else {}
    return {
        "task": row["task"],
        "against": row["against"],
        **mode,
        "points": f"{row['points']:+.1f}",
        "95 % interval": f"{row['points_low']:+.1f} to {row['points_high']:+.1f}",
        "outcome": row["outcome"],
    }


def _settings(rows: Iterable[Row], swept: bool) -> Table:
    """Return a row for each method on each task: the size that the budget chose, the setting that the sweep chose."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["setting"] or row["size"]:
            words = {"size": row["size"], **({"setting": _setting(row) or None} if swept else {})}
            chosen[row["task"], row["method"]] = words
    return [{"task": task, "method": method, **words} for (task, method), words in chosen.items()]


def _setting(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row["setting"].items())
