"""Turn plain mappings into settings and reject what is wrong, all faults at once, with the nearest right name."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from shadowtune.errors import ConfigError

Settings = TypeVar("Settings")
COMPLETIONS: dict[type, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
"""By settings dataclass, what completes a mapping before it is read, as a preset does."""


def check_range(settings: Any, **bounds: tuple[float, float | None]) -> None:
    """Check numeric fields of a dataclass: ``name=(low, high)`` means low <= value < high, no bound where None.

    Fields that are None are left alone. Raises ConfigError naming every field at fault.
    """
    faults = []
    for name, (low, high) in bounds.items():
        value = vars(settings)[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            faults.append(f"{name} must be a finite number, got {value!r}")
        elif value < low or (high is not None and value >= high):
            allowed = f"at least {low}" + ("" if high is None else f" and below {high}")
            faults.append(f"{name} must be {allowed}, got {value!r}")
    if faults:
        raise ConfigError("; ".join(faults))


def check_choices(settings: Any, **choices: tuple[str, ...]) -> None:
    """Check that fields of a dataclass hold one of the allowed words; raises ConfigError naming every fault."""
    faults = []
    for name, allowed in choices.items():
        value = vars(settings)[name]
        if value not in allowed:
            faults.append(f"{name} must be one of {', '.join(allowed)}, got {value!r}{nearest(value, allowed)}")
    if faults:
        raise ConfigError("; ".join(faults))


def nearest(word: Any, known: typing.Iterable[str]) -> str:
    """Return " (did you mean X?)" for the nearest known word, or nothing when none is near."""
    matches = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def from_mapping(kind: type[Settings], values: Any, where: str) -> Settings:
    """Build the dataclass ``kind``, nested dataclasses included, from a mapping.

    Args:
        kind: the dataclass to build.
        values: a mapping of field names to plain values.
        where: the dotted place of the mapping in the user's file, for messages.

    Raises:
        ConfigError: on unknown keys (with the nearest known one), wrong types, missing or out-of-range values.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the config'} must be a mapping of keys to values, got {values!r}")
    if kind in COMPLETIONS:
        values = COMPLETIONS[kind](values)
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    faults, arguments = [], {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in known:
            faults.append(f"unknown key {place}{nearest(key, known)}")
            continue
        try:
            arguments[key] = _convert(value, hints[key], place)
        except ConfigError as error:
            faults.append(str(error))
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            faults.append(f"missing key {f'{where}.{name}' if where else name}")
    if faults:
        raise ConfigError("; ".join(faults))
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Check ``value`` against a type hint; the only conversion made is int to float, plus 1e-3 written as text."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        if len(rest) == 1:
            return _convert(value, rest[0], place)
        for option in rest:
            try:
                return _convert(value, option, place)
            except ConfigError:
                continue
        raise ConfigError(f"{place} must be one of the types {rest}, got {value!r}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, place)  # type: ignore[arg-type]
    if origin is Literal:
        return _convert_choice(value, typing.get_args(hint), place)
    if origin in (list, tuple, dict):
        return _convert_container(value, origin, typing.get_args(hint), place)
    return _convert_scalar(value, hint, place)


def _convert_choice(value: Any, allowed: tuple[Any, ...], place: str) -> Any:
    if value not in allowed:
        words = [str(word) for word in allowed]
        raise ConfigError(f"{place} must be one of {', '.join(words)}, got {value!r}{nearest(value, words)}")
    return value


def _convert_container(value: Any, origin: type, arguments: tuple[Any, ...], place: str) -> Any:
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} must be a mapping, got {value!r}")
        return dict(value)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{place} must be a list, got {value!r}")
    return origin(_convert(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value))


def _convert_scalar(value: Any, hint: Any, place: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{place} must be {hint.__name__}, got {value!r}")
    return value
