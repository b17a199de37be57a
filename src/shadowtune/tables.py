"""How a value looks in a table, whoever prints it."""

from typing import Any


def format_value(value: Any) -> str:
    """Format one value: three decimals below 10, thousands separated, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
