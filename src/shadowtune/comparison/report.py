"""Report of a comparison: conclusions in sentences, ``report.md``, and a self-contained ``report.html``."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.comparison.analysis import SMALL, Analysis, Row
from shadowtune.comparison.plan import run_path
from shadowtune.comparison.plots import draw_accuracies, draw_costs, draw_curves, draw_pareto, draw_scaling
from shadowtune.comparison.run import Results
from shadowtune.comparison.tables import ALL, heading_of, not_compared, rows_table, standing, tables_of, trials_table
from shadowtune.evaluation.report import html_image, html_page, html_table, markdown_table, read_losses
from shadowtune.model.files import writing_into

TITLE = "shadowtune compare"
NOTE = (
    "Accuracy is the mean of the rows' scores (the task's metric), in %, on test rows, answered greedily. Intervals "
    "are 95 %: a bootstrap over test rows and seeds, paired for differences, each comparison by itself (of twenty "
    "between equals, one will look decided); where all scores are equal, the exact interval of a share. A method's "
    "loss in the curves is that of the model with its adapters, except for methods of PEFT that add terms of their own."
)
OUTCOMES = {
    "better": "significantly better than",
    "worse": "significantly worse than",
    "undecided": "undecided against",
}


def write_report(analysis: Analysis, directory: Path, results: Results | None = None) -> list[str]:
    """Write ``report.md`` and ``report.html`` atomically, and return the conclusions in sentences.

    Args:
        analysis: of the column "parameters".
        directory: directory of both files.
        results: of the comparison, for what is not in the rows.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    sentences, tables = conclusions(analysis, results), tables_of(analysis, results)
    summary = analysis.summary()
    pictures = _pictures(analysis, summary) if summary else []
    note = NOTE if analysis.config.sweep is None else f"{NOTE} Settings were chosen on validation rows alone."
    with writing_into(directory) as staging:
        (staging / "report.md").write_text(_markdown(sentences, tables, note))
        (staging / "report.html").write_text(_page(sentences, tables, pictures, note))
    return sentences


def conclusions(analysis: Analysis, results: Results | None = None) -> list[str]:
    """Return sentences: the winner of each column, the significant differences of the reference, and caveats."""
    differences, found = analysis.differences(), _columns(analysis)
    for mode in ("attached", "detached"):
        rows = [row for row in differences if row["mode"] == mode]
        for task in dict.fromkeys(row["task"] for row in rows):
            who = f"{'detached, ' if mode == 'detached' else ''}{analysis.reference}"
            found.append(f"{task}: {who} is {_outcome([row for row in rows if row['task'] == task])}.")
    shown = bool(found)
    found += _notes(analysis, results)
    if shown and len(analysis.config.seeds) == 1:
        found.append("One seed: the intervals do not contain how much another seed would change.")
    return found


def _columns(analysis: Analysis) -> list[str]:
    """The winner of each column, if there are several, and the standing of the reference there."""
    columns = [analysis.at(column) for column in analysis.columns]
    if len(columns) < 2:
        return []
    found, won = [], []
    for each in columns:
        rows = {row["method"]: row for row in each.standings()}
        if not rows:
            continue
        best = max(rows, key=lambda name: rows[name]["points"])
        word = "wins" if rows[best]["outcome"] == "better" else "is first, undecided"
        found.append(f"{heading_of(each)}: {best} {word} ({_span(rows[best])}, against {rows[best]['against']}).")
        if best == analysis.reference and rows[best]["outcome"] == "better":
            won.append(heading_of(each))
        elif analysis.reference in rows and best != analysis.reference:
            own = rows[analysis.reference]
            found.append(f"{heading_of(each)}: {analysis.reference} {standing(own)}.")
    return [f"{analysis.reference} wins {len(won)} of {len(columns)} columns: {', '.join(won) or 'none'}.", *found]


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the differences on one task, grouped by outcome."""
    parts = []
    for outcome, words in OUTCOMES.items():
        against = [f"{row['against']} ({_span(row)})" for row in rows if row["outcome"] == outcome]
        if against:
            parts.append(f"{words} {', '.join(against)}")
    return "; ".join(parts)


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['points']:+.1f} points, {row['points_low']:+.1f} to {row['points_high']:+.1f}"


def _notes(analysis: Analysis, results: Results | None = None) -> list[str]:
    """Return sentences on inequalities, missing runs, small test sets and results that were left out.

    Args:
        analysis: of the column "parameters".
        results: of the comparison, for what is not in the rows.
    """
    found = [*_unequal_sizes(analysis), *_unequal_rows(analysis), *_costs(analysis), *_edges(analysis)]
    found += fewer_rows(analysis.rows)
    if results is not None:
        found += _missing(results)
    if small := analysis.small():
        few = ", ".join(f"{task} ({count})" for task, count in small.items())
        found.append(f"Few test rows (below {SMALL}), so only large differences can be seen: {few}.")
    return found


def _unequal_sizes(analysis: Analysis) -> list[str]:
    """Methods without a size to choose, which do not train equally many parameters."""
    return [
        f"{name} trains {count:,} parameters and has no size to choose: its difference is not one at equal parameters, "
        "and it wins or loses nothing there."
        for name, count in analysis.unequal().items()
    ]


def _unequal_rows(analysis: Analysis) -> list[str]:
    """Tasks where one method reads validation examples in training and another does not."""
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
    """Runs whose measured time or memory misses the target."""
    budget, found = analysis.config.budget, []
    for column in analysis.columns:
        each = analysis.at(column)
        limit = 0.0 if budget is None else budget.measured_tolerance
        off = [row for row in each.costs() if abs(row["ratio"] - 1) > limit]
        if off:
            named = ", ".join(f"{row['task']} {row['method']} {row['ratio']:.2f}" for row in off)
            found.append(f"{heading_of(each)}: more than {limit:.0%} off as measured, times the aim: {named}.")
    if "time" in analysis.columns and analysis.config.jobs > 1:
        found.append(f"jobs={analysis.config.jobs}: runs at the same time slow one another; compare times at jobs=1.")
    return found


def _edges(analysis: Analysis) -> list[str]:
    """Methods whose chosen setting is the largest or smallest of those tried."""
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
    """Tasks with fewer examples than the settings ask for."""
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
    """Methods without results, and the number of results that were left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for row in not_compared(results):
        key = (row["method"], "" if row["where"] == ALL else f" at {row['where']}")
        groups.setdefault(key, []).append(row["task"])
        reasons.setdefault(key, row["why"])
    found = [
        f"Not compared: {method}{where} on {', '.join(tasks)} ({reasons[method, where]})."
        for (method, where), tasks in groups.items()
    ]
    if results.left_out:
        why = dict.fromkeys(row["why"] for row in results.left_out)
        found.append(f"{len(results.left_out)} earlier results are left out: {', '.join(why)}.")
    return found


def _pictures(analysis: Analysis, summary: Sequence[Mapping[str, Any]]) -> list[tuple[bytes, str]]:
    methods = list(analysis.config.methods)
    pictures = [(draw_accuracies(summary, methods), "accuracies with 95 % intervals")]
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    trained = [row for row in analysis.rows if row["training"] is not None]
    for row in trained:
        metrics = run_path(analysis.config, row["run"]) / "metrics.jsonl"
        if metrics.exists():  # a run known from results.jsonl alone has no curve
            curves.setdefault(row["task"], {}).setdefault(row["method"], []).append(read_losses(metrics))
    if curves:
        pictures.append((draw_curves(curves, methods), "training losses"))
    if trained:
        pictures.append((draw_costs(summary, methods), "training time, peak memory, trained parameters"))
    kinds = {method: analysis.config.kind(method) for method in methods}
    sizes = {(kinds[row["method"]], row["trainable_parameters"]) for row in summary if row["trainable_parameters"]}
    if any(row["train_seconds"] for row in summary):
        pictures.append((draw_pareto(summary, methods), "accuracy against training time and against peak memory"))
    if analysis.config.budget is None and len(sizes) > len({kind for kind, _ in sizes}):  # some kind in several sizes
        pictures.append((draw_scaling(summary, kinds), "accuracy over trained parameters"))
    return pictures


def _markdown(sentences: Sequence[str], tables: Mapping[str, Sequence[Mapping[str, Any]]], note: str) -> str:
    sections = [f"# {TITLE}\n", "".join(f"- {sentence}\n" for sentence in sentences)]
    sections += [f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables.items()]
    return "\n".join([*sections, f"{note}\n"])


def _page(
    sentences: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: Sequence[tuple[bytes, str]],
    note: str,
) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    parts = [f"<ul>{items}</ul>", *(html_image(picture, words) for picture, words in pictures)]
    parts += [f"<h2>{html.escape(heading)}</h2>{html_table(rows)}" for heading, rows in tables.items()]
    return html_page(TITLE, [*parts, f"<p>{html.escape(note)}</p>"])
