"""Read settings from YAML files and ``key=value`` arguments, combine mappings of them, and write resolved settings."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from shadowtune.config.settings import from_mapping, text_alternatives
from shadowtune.errors import ConfigError

Settings = TypeVar("Settings")

SHIPPED = Path(__file__).parent.parent / "configs"
"""Directory of the settings files that come with the package."""

_BOOL, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"


class _YamlLoader(yaml.SafeLoader):
    """YAML in which off, no and dates are text, as in YAML 1.2, and a repeated key is an error.

    The plain loader reads ``gradient_checkpointing: off`` as False, and silently keeps the last of two equal keys.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_config(kind: type[Settings], path: str | Path | None, overrides: Sequence[str]) -> Settings:
    """Read settings from a YAML file and apply overrides.

    Args:
        kind: the settings class.
        path: a YAML file with a mapping, or the name of one that comes with the package (``settings_file``). Paths in
            it are relative to the current directory. None starts without settings.
        overrides: ``key=value`` arguments with dotted keys; the last one wins. The value of a text setting is taken as
            it is, unless it is in quotes; other values are YAML. An empty value is YAML's null, which resets an
            optional setting.

    Raises:
        ConfigError: one line with the file and all errors in it.
    """
    try:
        text = "{}" if path is None else settings_file(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        assert path is not None
        meant = Path(path).is_relative_to("configs") or not Path(path).suffix  # one of the package's
        hint = f"; with the package come {', '.join(shipped_settings())}" if meant else ""
        raise ConfigError(f"cannot read {path}: {error.strerror}{hint}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text") from None
    values = _parse(text, str(path))
    if values is None:
        raise ConfigError(f"{path} is empty; it must hold settings as key: value lines")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as key: value lines, not a {type(values).__name__}")
    return build_config(kind, values, overrides, None if path is None else str(path))


def build_config(kind: type[Settings], values: dict[str, Any], overrides: Sequence[str], where: str | None) -> Settings:
    """Build settings from a mapping, which is changed, and overrides as in ``load_config``.

    Raises:
        ConfigError: one line with ``where``, if given, and all errors.
    """
    for override in overrides:
        _apply(kind, values, override)
    try:
        return from_mapping(kind, values)
    except ConfigError as error:
        raise ConfigError(_one_line(str(error) if where is None else f"{where}: {error}")) from None


def settings_file(path: str | Path) -> Path:
    """Return the path itself if it exists, else the file of that name in the package.

    So ``configs/tiny_cpu.yaml`` and ``tiny_cpu`` work in any directory, with an installed wheel too.
    """
    given = Path(path)
    if given.exists() or given.is_absolute() or ".." in given.parts:
        return given
    name = given.relative_to("configs") if given.is_relative_to("configs") else given
    shipped = SHIPPED / name.with_suffix(".yaml")
    return shipped if shipped.is_file() else given


def shipped_settings() -> list[str]:
    """Return the names of the settings files that come with the package, as ``settings_file`` takes them."""
    files = (file.relative_to(SHIPPED) for file in SHIPPED.rglob("*.yaml"))
    return sorted(
        f"configs/{file.as_posix()}" for file in files if file.parts[0] != "accelerate"
    )  # read by another program


def dump_config(config: Any, path: str | Path) -> None:
    """Write settings as YAML, completely or not at all; ``load_config`` reads them back.

    Raises:
        ConfigError: if the file cannot be written; an existing one stays as it was.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as handle:
            yaml.safe_dump(asdict(config), handle, sort_keys=False, width=120)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def merge_mappings(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the last layer wins. The result shares no mapping with the layers."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge_mappings(below if isinstance(below, Mapping) else {}, value)
            else:
                merged[key] = value
    return merged


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, adding missing ones; raises ConfigError if a part of it is no mapping."""
    names = key.split(".")
    inner = values
    for depth, name in enumerate(names[:-1], start=1):
        if inner.get(name) is None:
            inner[name] = {}
        inner = inner[name]
        if not isinstance(inner, dict):
            raise ConfigError(f"cannot set {key}: {'.'.join(names[:depth])} is {inner!r} and has no parts")
    inner[names[-1]] = value


def _parse(text: str, where: str) -> Any:
    """Parse one YAML document; ``where`` names it in errors."""
    try:
        return yaml.load(text, _YamlLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(_one_line(f"{where}{line}: {problem}")) from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}, line {number}: character U+{error.character:04X} is not allowed") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as error:  # PyYAML's, at 2024-13-45 and values like !!bool x
        raise ConfigError(_one_line(f"{where}: a value does not fit its YAML type ({error})")) from None


def _apply(kind: type, values: dict[str, Any], override: str) -> None:
    """Apply an override such as ``optimizer.learning_rate=1e-3`` to the settings of a class."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{override!r} is not of the form key=value, such as optimizer.learning_rate=1e-3")
    alternatives = text_alternatives(kind, names)
    where = f"in {override!r}"
    value = _parse(text, where) if alternatives is None else _parse_text(text, alternatives, where)
    put(values, ".".join(names), value)


def _parse_text(text: str, alternatives: tuple[type, ...], where: str) -> Any:
    """Return the value of a setting that is text: the characters themselves, so that "a: b" needs no inner quotes.

    Text in quotes, null, and the other types that the setting allows (``alternatives``) are read as YAML.
    """
    bare = text.strip()
    if bare in ("", "~", "null", "Null", "NULL"):
        return None
    try:
        value = _parse(text, where)
    except ConfigError:
        closing = {"[": "]", "{": "}"}.get(bare[0])
        if alternatives and closing is not None and closing not in bare[:-1]:  # no name such as "[x].jsonl"
            raise
        return text
    quoted = bare[0] in "'\"" and isinstance(value, str)
    return value if quoted or isinstance(value, alternatives) else text


def _one_line(message: str) -> str:
    return " ".join(message.split())
