"""Nested mappings of settings: put one over another, set a dotted key, find keys that no settings have."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from shadowtune.config.checking import nearest
from shadowtune.config.presets import preset_of
from shadowtune.errors import ConfigError


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Put training settings over one another, nested ones too; the last one wins.

    A layer with a ``preset`` brings the preset's settings, which win over the layers before it.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        preset = preset_of(_merge(merged, layer)) if "preset" in layer else {}
        merged = _merge(merged, preset, layer)
    return merged


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = _merge(below if isinstance(below, Mapping) else {}, value)
            else:
                merged[key] = value
    return merged


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, making those that are missing; raises ConfigError where a part has none."""
    names = key.split(".")
    place = values
    for depth, name in enumerate(names[:-1], start=1):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise ConfigError(f"cannot set {key}: {'.'.join(names[:depth])} is {place!r} and has no parts")
    place[names[-1]] = value


def unknown_keys(kind: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Say which keys of a mapping, nested ones too, the dataclass ``kind`` does not have, with the nearest it has.

    A mapping that lacks required keys is fine: it may be a part of the whole.
    """
    hints = typing.get_type_hints(kind)
    faults = []
    for key, value in values.items():
        if key not in hints:
            faults.append(f"unknown key {where}.{key}{nearest(key, hints)}")
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            faults += unknown_keys(typing.cast(type, hints[key]), value, f"{where}.{key}")
    return faults
