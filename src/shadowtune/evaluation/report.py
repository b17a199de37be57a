"""Figures, tables and self-contained HTML pages of reports."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.errors import ShadowtuneError
from shadowtune.model.files import writing_into
from shadowtune.tables import format_value, line_style

COLORS = {"base": "#9aa0a6", "lora": "#e8913a", "shadow": "#3b6fd4", "shadow-detached": "#7fb2f0"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
p, li, h1, h2, td { overflow-wrap: anywhere } pre { overflow-x: auto } img { max-width: 100%; height: auto }
.table { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; width: 100% }
td { min-width: 3.5rem }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
"""


def read_losses(metrics_file: Path) -> list[tuple[int, float]]:
    """Return (step, training loss) from a run's ``metrics.jsonl``; for a shadow, the loss of the attached model."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    return [(line["step"], line.get("base_loss", line["loss"])) for line in lines if "loss" in line]


def draw(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """Draw accuracy with 95 % intervals, training time and training loss side by side; return a PNG.

    Args:
        rows: flat rows with ``method``, ``accuracy``, ``accuracy_low``, ``accuracy_high`` and ``train_seconds``.
        curves: for each trained method its (step, loss) pairs.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    figure = new_figure(12, 3.6)
    bars, times, losses = figure.subplots(1, 3)
    names = [row["method"] for row in rows]
    heights = [100 * row["accuracy"] for row in rows]
    spread = [
        [max(0.0, 100 * (row["accuracy"] - row["accuracy_low"])) for row in rows],
        [max(0.0, 100 * (row["accuracy_high"] - row["accuracy"])) for row in rows],
    ]
    labels = [name.replace("-", "\n") for name in names]
    drawn = bars.bar(labels, heights, yerr=spread, capsize=4, color=[COLORS.get(name, "#888888") for name in names])
    bars.bar_label(drawn, fmt="%.1f", padding=2)
    bars.set(title="accuracy on held-out requests, %", ylim=(0, 112))
    trained = [row for row in rows if row["method"] in curves]
    methods = [row["method"] for row in trained]
    drawn = times.barh(
        methods, [row["train_seconds"] for row in trained], color=[COLORS.get(name, "#888888") for name in methods]
    )
    times.bar_label(drawn, fmt="%.0f s", padding=2)
    times.set(title="training time")
    times.margins(x=0.2)
    for name, points in curves.items():
        steps, values = [step for step, _ in points], [loss for _, loss in points]
        losses.plot(steps, values, line_style(len(points)), label=name, color=COLORS.get(name))
    losses.set(title="training loss", xlabel="step", yscale="log")
    if curves:
        losses.legend()
    if not any(curves.values()):
        losses.text(0.5, 0.5, "no step was logged", ha="center", transform=losses.transAxes)
    return png(figure)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, sides in inches; raises ShadowtuneError if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ShadowtuneError("the picture needs matplotlib: pip install 'shadowtune[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """Return a figure as a PNG, its axes without frames, logarithmic ones with numbers that have room."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _number_decades(axis)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def page(
    title: str, rows: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]], picture: bytes, note: str
) -> str:
    """Return the HTML page: figure, table of results, example answers, and a note.

    Args:
        rows: flat rows with the same keys, the first of which is the name of the row.
        examples: flat rows with the same keys: a request, the expected answer, the answer of each model.
    """
    parts = (
        html_image(picture, "accuracy, training time and training loss"),
        f"{html_table(rows)}<h2>Examples</h2>{html_table(examples)}",
        f"<p>{html.escape(note)}</p>",
    )
    return html_page(title, parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page of HTML parts under a plain text title."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def html_image(picture: bytes, description: str) -> str:
    """Return a PNG as an ``img`` element with embedded data."""
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return flat rows as a table that scrolls on narrow pages; the keys of the first row are the columns."""
    header = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(format_value(value))}</td>' for value in row.values())}</tr>" for row in rows
    )
    return f'<div class="table"><table><tr>{header}</tr>{body}</table></div>'


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return flat rows as a Markdown table; the keys of the first row are the columns."""
    keys = list(rows[0])
    lines = [keys, ["---" if index < 2 else "--:" for index in range(len(keys))]]
    lines += [[format_value(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(directory: Path, picture: bytes, text: str) -> None:
    """Write ``report.png`` and ``report.html`` into ``directory``, atomically."""
    with writing_into(directory) as staging:
        (staging / "report.png").write_bytes(picture)
        (staging / "report.html").write_text(text)


def _number_decades(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers that fit its range."""
    from matplotlib.ticker import AutoLocator, LogLocator

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(AutoLocator() if high < 5 * low else LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
