"""Formatting that packages share which do not import each other: table cells, axes and line styles of figures."""

from typing import Any


def format_value(value: Any) -> str:
    """Format one value: three decimals below 10, thousands separated, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def keep_within(axis: Any, low: float, high: float | None = None) -> None:
    """Limit an axis of matplotlib to possible values, for instance to percentages from 0 on.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``, after everything is drawn.
        low: the lowest possible value.
        high: the highest; None if there is none.
    """
    left, right = sorted(axis.get_view_interval())
    limits = (max(left, low), right if high is None else min(right, high))
    if axis.axis_name == "x":
        axis.axes.set_xlim(limits)
    else:
        axis.axes.set_ylim(limits)
    for line in axis.axes.lines:
        line.set_clip_on(False)  # draw markers at the limits completely


def line_style(points: int, style: str = "-") -> str:
    """Return the matplotlib style of a curve: a marker for a single point, which a line does not show."""
    return "o" if points == 1 else style


def duration(seconds: float) -> str:
    """Format a time, such as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
