"""Tables for planning, kept as JSON beside the shipped settings: well-known bases by name, and devices."""

import json
from typing import Any

from shadowtune.config.loading import SHIPPED


def shapes() -> dict[str, dict[str, Any]]:
    """Return the configs of well-known bases by name, which need no download."""
    found: dict[str, dict[str, Any]] = json.loads((SHIPPED / "shapes.json").read_text())
    return found


def device_table() -> dict[str, dict[str, float]]:
    """Return memory and highest rates of known devices by name, as their makers state them (dense products)."""
    found: dict[str, dict[str, float]] = json.loads((SHIPPED / "devices.json").read_text())
    return found
