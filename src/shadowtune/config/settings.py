"""Settings classes: frozen dataclasses validated by pydantic, whose errors are one ``ConfigError`` with all messages.

A class is declared with ``@settings``. What a single value must be is in its annotation (``rank: PositiveInt = 16``);
rules about several values are in ``__post_init__``. Keywords in Python and ``from_mapping`` are checked alike.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import dataclass_transform

from shadowtune.errors import ConfigError

Settings = TypeVar("Settings")

RENAMED = {
    "head_mixing": "logit_interpolation",
    "fit_head_mixing": "fit_logit_interpolation",
    "hand_over_rate": "deferral_rate",
}
"""Settings of release 0.1.0 -> their names now. Until 0.3.0 old ones are read, with a warning where a user writes one.
"""
RENAMED_VALUES = {("drafter", "feedback"): "draft_head", ("validation", "held_back"): "hold_out"}
"""Values of settings, by name and old value, likewise."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "a number, not a boolean")
    return value


NUMBER = BeforeValidator(_refuse_bool)
"""Metadata of every float, after its bounds. Pydantic reads 1, 1.0, "1e-3" (text in YAML 1.1), and True, which is none.
"""
Float = Annotated[float, NUMBER]
NonNegativeFloat = Annotated[float, Ge(0), NUMBER]
PositiveFloat = Annotated[float, Gt(0), NUMBER]
Fraction = Annotated[float, Ge(0), Lt(1), NUMBER]
Seconds = Annotated[float, Ge(0.001), NUMBER]
PositiveInt = Annotated[StrictInt, Ge(1)]
NonNegativeInt = Annotated[StrictInt, Ge(0)]

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(kind: type[Settings]) -> type[Settings]:
    """Make a settings class: a frozen pydantic dataclass that raises ConfigError in place of ValidationError."""
    made: Any = pydantic_dataclass(kind, frozen=True, config=_CONFIG)
    validate = made.__init__

    @functools.wraps(validate)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **current_names(kwargs))
        except ValidationError as error:
            raise ConfigError(_one_message(made, error.errors(), "")) from None

    made.__init__ = construct
    return typing.cast(type[Settings], made)


def from_mapping(kind: type[Settings], values: Any, where: str = "") -> Settings:
    """Build a dataclass, nested ones included, from a mapping of field names to plain values.

    Args:
        kind: a settings class, or a plain dataclass, whose ints and booleans are then read leniently.
        values: the mapping, as a YAML or JSON file holds it.
        where: the dotted key of the mapping in the user's file, for messages.

    Raises:
        ConfigError: on unknown keys (with the nearest known one), wrong types, missing or out-of-range values.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the config'} must be a mapping of keys to values, got {values!r}")
    try:
        return typing.cast(Settings, _reader(typing.cast(Hashable, kind))((current_names(values),))[0])
    except ValidationError as error:
        errors: list[Any] = [{**each, "loc": each["loc"][1:]} for each in error.errors()]
        raise ConfigError(_one_message(kind, errors, where)) from None


@functools.cache
def _reader(kind: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Return the validator of a tuple of one: pydantic takes a config for a plain dataclass only inside of a type."""
    return TypeAdapter(tuple[kind], config=_CONFIG).validate_python


def raise_errors(errors: Iterable[str]) -> None:
    """Raise one ConfigError with all messages; return if there are none."""
    if message := "; ".join(errors):
        raise ConfigError(message)


def current_names(values: Any, warn: bool = True) -> Any:
    """Replace old names and values in a mapping, in nested ones and lists of them, and in dotted keys."""
    if isinstance(values, list):
        return [current_names(value, warn) for value in values]
    if not isinstance(values, Mapping):
        return values
    renamed = {}
    for key, value in values.items():
        above, dot, name = str(key).rpartition(".")
        if name in RENAMED:
            if warn:
                warnings.warn(f"the setting {name} is now called {RENAMED[name]}", FutureWarning, stacklevel=3)
            key = f"{above}{dot}{RENAMED[name]}"
        renamed[key] = current_value(name, current_names(value, warn), warn)
    return renamed


def current_value(name: str, value: Any, warn: bool = True) -> Any:
    """Replace an old value of the setting ``name``; return any other value as it is."""
    if not isinstance(value, str) or (name, value) not in RENAMED_VALUES:
        return value
    current = RENAMED_VALUES[name, value]
    if warn:
        warnings.warn(f"{name} {value} is now called {current}", FutureWarning, stacklevel=4)
    return current


def nearest(word: Any, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the nearest known word, or "" if none is near."""
    matches = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def unknown_keys(kind: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Return an error for each key, nested ones included, that a settings class lacks; missing keys are no error."""
    hints = typing.get_type_hints(kind)
    errors = []
    for key, value in values.items():
        if key not in hints:
            errors.append(f"unknown key {where}.{key}{nearest(key, hints)}")
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            errors += unknown_keys(typing.cast(type, hints[key]), value, f"{where}.{key}")
    return errors


def check_range(values: Any, **bounds: tuple[float, float | None]) -> None:
    """Check numeric fields of a plain dataclass: ``name=(low, high)`` means low <= value < high, no bound where None.

    Fields that are None are skipped. Raises ConfigError naming every field out of its range.
    """
    errors = []
    for name, (low, high) in bounds.items():
        value = vars(values)[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            errors.append(f"{name} must be a finite number, got {value!r}")
        elif value < low or (high is not None and value >= high):
            allowed = f"at least {low}" + ("" if high is None else f" and below {high}")
            errors.append(f"{name} must be {allowed}, got {value!r}")
    raise_errors(errors)


def check_choices(values: Any, **choices: tuple[str, ...]) -> None:
    """Check that fields of a plain dataclass hold an allowed word; raises ConfigError naming all that do not."""
    given = {name: vars(values)[name] for name in choices}
    raise_errors(
        f"{name} must be one of {', '.join(choices[name])}, got {value!r}{nearest(value, choices[name])}"
        for name, value in given.items()
        if value not in choices[name]
    )


def describe(hint: Any) -> str:
    """Describe the values of a type annotation, without its bounds: "int", "one of linear, cosine"."""
    hint = _without_none(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return arguments[0] if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin in (list, tuple):
        return "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return "a mapping of keys to values" if dataclasses.is_dataclass(hint) else str(hint.__name__)


def describe_bounds(hint: Any) -> str:
    """Describe the numbers that a type annotation allows: "at least 1 and below 65"; "" if all."""
    words = {Ge: "at least", Gt: "above", Lt: "below", Le: "at most"}
    parts = [hint, *typing.get_args(hint)]
    bounds = [bound for part in parts for bound in getattr(part, "__metadata__", ()) if type(bound) in words]
    return " and ".join(f"{words[type(bound)]} {dataclasses.astuple(bound)[0]}" for bound in dict.fromkeys(bounds))


def _one_message(kind: type, errors: Iterable[ErrorDetails], where: str) -> str:
    """Join the messages of pydantic's errors: unknown keys, then wrong values, then missing keys."""
    unknown, wrong, missing = [], {}, []
    for error in errors:
        key, hint, owner = _follow(kind, error["loc"], where)
        if error["type"] == "unexpected_keyword_argument":
            known = [field.name for field in dataclasses.fields(owner)]
            unknown.append(f"unknown key {key}{_known_key(kind, where, str(error['loc'][-1]), known)}")
        elif error["type"] == "missing":
            missing.append(f"missing key {key}")
        elif key not in wrong:  # each alternative of a union has an error of its own
            wrong[key] = _wrong_value(key, hint, error)
    return "; ".join([*unknown, *wrong.values(), *missing])


def _known_key(kind: type, where: str, name: str, known: list[str]) -> str:
    """Return the hint for an unknown key: the same name elsewhere in the settings, a near one beside it, or elsewhere.

    So a name without its section (``learning_rate``) is found (``optimizer.learning_rate``).
    """
    prefix = f"{where}." if where else ""
    keys = [f"{prefix}{key}" for key in _dotted_keys(kind)]
    same = [key for key in keys if key.rpartition(".")[2] == name]
    if same:
        return f" (did you mean {' or '.join(same)}?)"
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = difflib.get_close_matches(name, names, n=1)
    return nearest(name, known) or (f" (did you mean {names[near[0]]}?)" if near else "")


def _dotted_keys(kind: Any) -> list[str]:
    """Return the dotted keys of a settings class, those of nested classes included."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = _without_none(hint)
        keys += [f"{name}.{key}" for key in _dotted_keys(inner)] if dataclasses.is_dataclass(inner) else [name]
    return keys


def text_alternatives(kind: type, names: Iterable[str]) -> tuple[type, ...] | None:
    """Return the types that YAML has for a setting beside text, such as list; None if it may not be text.

    Args:
        kind: the settings class.
        names: the parts of the setting's dotted key.
    """
    hint = _without_none(_follow(kind, names, "")[1])
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if str not in options:
        return None
    origins = [typing.get_origin(option) or option for option in options if option is not str]
    return tuple(list if origin is tuple else origin for origin in origins if isinstance(origin, type))


def _wrong_value(key: str, hint: Any, error: ErrorDetails) -> str:
    """Return the message of a value that its type annotation, or a ``__post_init__``, does not allow."""
    kind, value = error["type"], error["input"]
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if error["loc"][-1:] == ("[key]",):
        return f"the key {key} must be text, got {value!r}"
    if kind == "literal_error":
        words = list(map(str, typing.get_args(_without_none(hint))))
        return f"{key} must be {describe(hint)}, got {value!r}{nearest(value, words)}"
    if kind.startswith(("greater_", "less_")):
        return f"{key} must be {describe_bounds(hint)}, got {value!r}"
    return f"{key} must be {'a finite number' if kind == 'finite_number' else describe(hint)}, got {value!r}"


def _follow(kind: type, location: Iterable[int | str], where: str) -> tuple[str, Any, Any]:
    """Follow pydantic's location of an error: the dotted key, the type annotation there, the class that has the key."""
    key, hint, owner = where, kind, kind
    for part in location:
        hint = _without_none(hint)
        origin = typing.get_origin(hint)
        if dataclasses.is_dataclass(hint):
            owner = typing.cast(type, hint)
            hint = typing.get_type_hints(owner, include_extras=True).get(str(part), Any)
            key += f".{part}"
        elif origin in (list, tuple):
            hint = typing.get_args(hint)[0]
            key += f"[{part}]"
        elif origin is dict:
            hint = typing.get_args(hint)[1]
            key += f".{part}"
        else:  # an alternative of a union
            break
    return key.removeprefix("."), hint, owner


def _without_none(hint: Any) -> Any:
    """Take Annotated and ``| None`` off a type annotation."""
    if typing.get_origin(hint) is Annotated:
        return _without_none(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _without_none(options[0]) if len(options) == 1 else typing.Union[tuple(options)]  # noqa: UP007
    return hint
