"""What a comparison found, for people: a Markdown table, an HTML page that needs nothing beside it, and words."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.benchmark.rows import markdown_table
from shadowtune.comparison.analysis import SMALL, Analysis
from shadowtune.comparison.plan import run_path
from shadowtune.comparison.plots import draw_accuracies, draw_costs, draw_curves, draw_scaling
from shadowtune.evaluation.report import html_image, html_page, html_table, read_losses
from shadowtune.model.checkpoint import writing_into

TITLE = "shadowtune compare"
NOTE = (
    "Accuracy is the mean of the rows' scores (the task's metric), in %, on test rows, answered greedily. Intervals "
    "are 95 %: a bootstrap over test rows and seeds, paired for differences, each comparison by itself (of twenty "
    "between equals, one will look decided). Settings were chosen on validation rows alone. A method's loss in the "
    "curves is that of the model with its adapters, except for methods of PEFT, whose own terms are in it."
)
OUTCOMES = {
    "better": "significantly better than",
    "worse": "significantly worse than",
    "undecided": "undecided against",
}
HEADINGS = {
    "accuracy": "Results",
    "difference": "Differences",
    "best": "Against the best of the others",
    "setting": "Settings that the sweep chose",
    "failed": "Failed runs",
}


def write_report(analysis: Analysis, directory: Path) -> list[str]:
    """Write ``report.md`` and ``report.html``, whole or not at all, and return the verdict in sentences.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    said, tables, summary = verdict(analysis), tables_of(analysis), analysis.summary()
    pictures = _pictures(analysis, summary) if summary else []
    with writing_into(directory) as staging:
        (staging / "report.md").write_text(_markdown(said, tables))
        (staging / "report.html").write_text(_page(said, tables, pictures))
    return said


def verdict(analysis: Analysis) -> list[str]:
    """Say in sentences where the reference is significantly better or worse, and which rows are few."""
    differences, said = analysis.differences(), []
    for mode in ("attached", "detached"):
        rows = [row for row in differences if row["mode"] == mode]
        for task in dict.fromkeys(row["task"] for row in rows):
            who = f"{'detached, ' if mode == 'detached' else ''}{analysis.reference}"
            said.append(f"{task}: {who} is {_outcome([row for row in rows if row['task'] == task])}.")
    if small := analysis.small():
        few = ", ".join(f"{task} ({count})" for task, count in small.items())
        said.append(f"Few test rows (below {SMALL}), so only large differences can be seen: {few}.")
    if said and len(analysis.config.seeds) == 1:
        said.append("One seed: the intervals do not contain how much another seed would change.")
    return said


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Word the verdicts of one task, those of a kind together."""
    parts = []
    for outcome, words in OUTCOMES.items():
        against = [f"{row['against']} ({_span(row)})" for row in rows if row["verdict"] == outcome]
        if against:
            parts.append(f"{words} {', '.join(against)}")
    return "; ".join(parts)


def tables_of(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the report by heading, worded for people; those without rows are left out."""
    differences, best = analysis.differences(), analysis.against_best()
    tables = {
        "accuracy": results_table(analysis),
        "best": [_difference(row) for row in best],
        "difference": [_difference(row) for row in differences],
        "setting": _settings(analysis.rows),
        "failed": [{"run": row["run"], "why": row["error"]} for row in analysis.failed],
    }
    swept = any(row["setting"] for row in analysis.rows)
    headings = HEADINGS if swept else HEADINGS | {"setting": "Sizes within the budget"}
    return {headings[name]: rows for name, rows in tables.items() if rows}


def results_table(analysis: Analysis) -> list[dict[str, Any]]:
    """Return a row for each task, method and mode, worded for people."""
    return [_result(row) for row in analysis.summary()]


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    percent = [100 * row[name] for name in ("accuracy", "accuracy_low", "accuracy_high")]
    return {
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
        "training s": row["train_seconds"],
        "tokens/s": row["tokens_per_second"],
        "memory MB": row["peak_memory_mb"],
        "answers, tokens/s": row["answer_tokens_per_second"],
        "s/answer": row["answer_seconds"],
    }


def _difference(row: Mapping[str, Any]) -> dict[str, Any]:
    mode = {"mode": row["mode"]} if "mode" in row else {}
    return {
        "task": row["task"],
        "against": row["against"],
        **mode,
        "points": f"{row['points']:+.1f}",
        "95 % interval": f"{row['points_low']:+.1f} to {row['points_high']:+.1f}",
        "verdict": row["verdict"],
    }


def _settings(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say what was chosen for each method on each task: by the budget, and by the sweep."""
    chosen = {}
    for row in rows:
        setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
        if setting or row["size"]:
            chosen[row["task"], row["method"]] = {"size": row["size"], "setting": setting or None}
    if not any(words["setting"] for words in chosen.values()):  # no sweep chose any
        chosen = {key: {"size": words["size"]} for key, words in chosen.items()}
    return [{"task": task, "method": method, **words} for (task, method), words in chosen.items()]


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
    if analysis.config.budget is None and len(sizes) > len({kind for kind, _ in sizes}):  # some kind in several sizes
        pictures.append((draw_scaling(summary, kinds), "accuracy over trained parameters"))
    return pictures


def _markdown(said: Sequence[str], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    sections = [f"# {TITLE}\n", "".join(f"- {sentence}\n" for sentence in said)]
    sections += [f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables.items()]
    return "\n".join([*sections, f"{NOTE}\n"])


def _page(
    said: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: Sequence[tuple[bytes, str]],
) -> str:
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    parts = [f"<ul>{sentences}</ul>", *(html_image(picture, words) for picture, words in pictures)]
    parts += [f"<h2>{html.escape(heading)}</h2>{html_table(rows)}" for heading, rows in tables.items()]
    return html_page(TITLE, [*parts, f"<p>{html.escape(NOTE)}</p>"])
