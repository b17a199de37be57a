"""What a comparison found, for people: a Markdown table, an HTML page that needs nothing beside it, and words."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.benchmark.rows import markdown_table
from shadowtune.comparison.analysis import Analysis
from shadowtune.comparison.notes import notes
from shadowtune.comparison.plan import run_path
from shadowtune.comparison.plots import draw_accuracies, draw_costs, draw_curves, draw_pareto, draw_scaling
from shadowtune.comparison.run import Results
from shadowtune.comparison.tables import heading_of, standing, tables_of
from shadowtune.evaluation.report import html_image, html_page, html_table, read_losses
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
    """Write ``report.md`` and ``report.html``, whole or not at all, and return the verdict in sentences.

    Args:
        analysis: of the column "parameters".
        directory: where to.
        results: what else is known than rows.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    said, tables, summary = verdict(analysis, results), tables_of(analysis, results), analysis.summary()
    pictures = _pictures(analysis, summary) if summary else []
    note = NOTE if analysis.config.sweep is None else f"{NOTE} Settings were chosen on validation rows alone."
    with writing_into(directory) as staging:
        (staging / "report.md").write_text(_markdown(said, tables, note))
        (staging / "report.html").write_text(_page(said, tables, pictures, note))
    return said


def verdict(analysis: Analysis, results: Results | None = None) -> list[str]:
    """Say in sentences who wins which column, where the reference is better or worse, and what a reader must know."""
    differences, said = analysis.differences(), _columns(analysis)
    for mode in ("attached", "detached"):
        rows = [row for row in differences if row["mode"] == mode]
        for task in dict.fromkeys(row["task"] for row in rows):
            who = f"{'detached, ' if mode == 'detached' else ''}{analysis.reference}"
            said.append(f"{task}: {who} is {_outcome([row for row in rows if row['task'] == task])}.")
    shown = bool(said)
    said += notes(analysis, results)
    if shown and len(analysis.config.seeds) == 1:
        said.append("One seed: the intervals do not contain how much another seed would change.")
    return said


def _columns(analysis: Analysis) -> list[str]:
    """Say of each column, where there are several, who wins it, and how the reference stands there."""
    columns = [analysis.at(column) for column in analysis.columns]
    if len(columns) < 2:
        return []
    said, won = [], []
    for each in columns:
        rows = {row["method"]: row for row in each.standings()}
        if not rows:
            continue
        best = max(rows, key=lambda name: rows[name]["points"])
        word = "wins" if rows[best]["verdict"] == "better" else "is first, undecided"
        said.append(f"{heading_of(each)}: {best} {word} ({_span(rows[best])}, against {rows[best]['against']}).")
        if best == analysis.reference and rows[best]["verdict"] == "better":
            won.append(heading_of(each))
        elif analysis.reference in rows and best != analysis.reference:
            own = rows[analysis.reference]
            said.append(f"{heading_of(each)}: {analysis.reference} {standing(own)}.")
    return [f"{analysis.reference} wins {len(won)} of {len(columns)} columns: {', '.join(won) or 'none'}.", *said]


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Word the verdicts of one task, those of a kind together."""
    parts = []
    for outcome, words in OUTCOMES.items():
        against = [f"{row['against']} ({_span(row)})" for row in rows if row["verdict"] == outcome]
        if against:
            parts.append(f"{words} {', '.join(against)}")
    return "; ".join(parts)


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['points']:+.1f} points, {row['points_low']:+.1f} to {row['points_high']:+.1f}"


def _pictures(analysis: Analysis, summary: Sequence[Mapping[str, Any]]) -> list[tuple[bytes, str]]:
    methods = list(analysis.config.methods)
    pictures = [(draw_accuracies(summary, methods), "accuracies with 95 % intervals")]
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    trained = [row for row in analysis.rows if row["training"] is not None]
    for row in trained:
        metrics = run_path(analysis.config, row["run"]) / "metrics.jsonl"
        if metrics.exists():  # a run known from results.jsonl alone has left no curve
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


def _markdown(said: Sequence[str], tables: Mapping[str, Sequence[Mapping[str, Any]]], note: str) -> str:
    sections = [f"# {TITLE}\n", "".join(f"- {sentence}\n" for sentence in said)]
    sections += [f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables.items()]
    return "\n".join([*sections, f"{note}\n"])


def _page(
    said: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: Sequence[tuple[bytes, str]],
    note: str,
) -> str:
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    parts = [f"<ul>{sentences}</ul>", *(html_image(picture, words) for picture, words in pictures)]
    parts += [f"<h2>{html.escape(heading)}</h2>{html_table(rows)}" for heading, rows in tables.items()]
    return html_page(TITLE, [*parts, f"<p>{html.escape(note)}</p>"])
