"""How values look in a table, and axes of percentages and costs in a plot, whoever draws them."""

from typing import Any


def format_value(value: Any) -> str:
    """Format one value: three decimals below 10, thousands separated, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def keep_within(axis: Any, low: float, high: float | None = None) -> None:
    """Let an axis of matplotlib show no values that there cannot be, such as negative percentages beside bars of 0 %.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``, after everything is drawn.
        low: the least value that there can be.
        high: the largest; None if there is none.
    """
    left, right = sorted(axis.get_view_interval())
    limits = (max(left, low), right if high is None else min(right, high))
    if axis.axis_name == "x":
        axis.axes.set_xlim(limits)
    else:
        axis.axes.set_ylim(limits)
    for line in axis.axes.lines:
        line.set_clip_on(False)  # a mark at the very end is drawn whole


def line_style(points: int, style: str = "-") -> str:
    """Return the style of a curve for matplotlib: a mark where it has a single point, of which a line shows nothing."""
    return "o" if points == 1 else style
