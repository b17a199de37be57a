"""JSON schemas of the settings, for editors, and the settings reference: both are generated from the classes.

The files in ``configs/schema/`` and ``docs/settings.md`` are the output of ``shadowtune schema NAME``.
"""

import ast
import dataclasses
import inspect
import json
import typing
from typing import Any

from pydantic import TypeAdapter

from shadowtune.config.comparison import BASELINES, KINDS, RESERVED, CompareConfig, TaskOptions
from shadowtune.config.data import TaskConfig
from shadowtune.config.serving import CloudConfig, PolicyConfig, ServerConfig, SimulationConfig
from shadowtune.config.settings import describe, describe_bounds
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.config.training import TrainConfig

SCHEMAS: dict[str, type] = {"train": TrainConfig, "compare": CompareConfig, "task": TaskConfig, "policy": PolicyConfig}
"""Name of a schema -> settings class of the files that it describes."""
_REFERENCE: dict[str, tuple[type, ...]] = {
    "Training (`shadowtune train`, `shadowtune pretrain`)": (TrainConfig,),
    "Comparison (`shadowtune compare`)": (CompareConfig, TaskOptions),
    "Task (a `.yaml` file in `data.task`)": (TaskConfig,),
    "Speculative decoding": (SpeculationConfig,),
    "Servers, routing and simulation": (ServerConfig, CloudConfig, PolicyConfig, SimulationConfig),
}
_HEAD = """# Settings

Every setting with its type, its default and its meaning. Generated from the settings classes by
`shadowtune schema reference`; a test keeps it current. `None` in Python is `null` in YAML.

Editors with the YAML language server complete and check a settings file that begins with the line

    # yaml-language-server: $schema=train.schema.json

where `shadowtune schema train > train.schema.json` writes the file (or `compare`, `task`).
"""


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a kind of settings files, with the docstrings of the settings as descriptions."""
    schema = TypeAdapter(SCHEMAS[name]).json_schema()
    kinds = {kind.__name__: kind for kind in _nested(SCHEMAS[name])}
    for part in (schema, *schema.get("$defs", {}).values()):
        kind = kinds[part.pop("title")]
        part["description"] = _summary(kind)
        for key, text in _docstrings(kind).items():
            part["properties"][key].pop("title", None)
            part["properties"][key] |= {"description": text} if text else {}
    if name == "compare":
        _complete_comparison(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def settings_reference() -> str:
    """Return the reference of all settings as Markdown."""
    lines = [_HEAD]
    for title, roots in _REFERENCE.items():
        lines.append(f"## {title}\n")
        for kind in dict.fromkeys(kind for root in roots for kind in _nested(root)):
            lines += [f"### {kind.__name__}\n", _summary(kind).replace("``", "`") + "\n"]
            lines += [*(_entry(kind, key, text) for key, text in _docstrings(kind).items()), ""]
    return "\n".join(lines)


def _complete_comparison(schema: dict[str, Any]) -> None:
    """Describe common, tasks, methods and sweep.settings, which are any mapping to pydantic, as training settings."""
    train, options = json_schema("train"), TypeAdapter(TaskOptions).json_schema()
    run = {key: value for key, value in train["properties"].items() if key not in RESERVED}
    method = {"enum": [*KINDS, *BASELINES], "description": run["method"]["description"]}
    size = {"type": "string", "description": "Dotted key that the budget sets; none sets none."}

    def mapping(properties: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "additionalProperties": False}

    schema["$defs"] |= train["$defs"] | {
        "RunSettings": mapping(run),
        "Task": {"anyOf": [mapping({**run, **options["properties"]}), {"type": "null"}]},
        "Method": {"anyOf": [mapping({**run, "method": method, "size": size}), {"type": "null"}]},
    }
    schema["properties"]["common"]["$ref"] = "#/$defs/RunSettings"
    schema["properties"]["common"].pop("additionalProperties", None)
    schema["properties"]["tasks"]["additionalProperties"] = {"$ref": "#/$defs/Task"}
    schema["properties"]["methods"]["additionalProperties"] = {"$ref": "#/$defs/Method"}
    settings = schema["$defs"]["SweepConfig"]["properties"]["settings"]
    settings["$ref"] = "#/$defs/RunSettings"
    settings.pop("additionalProperties", None)


def _entry(kind: type, key: str, text: str) -> str:
    """Return the line of one setting."""
    hint = typing.get_type_hints(kind, include_extras=True)[key]
    field = next(field for field in dataclasses.fields(kind) if field.name == key)
    inner = [part.__name__ for part in (hint, *typing.get_args(hint)) if part in _nested(kind)]
    words = " ".join(filter(None, [*(inner or [describe(hint)]), describe_bounds(hint)]))
    if type(None) in typing.get_args(hint):
        words += ", or null"
    if field.default is not dataclasses.MISSING:
        default = f"default `{json.dumps(field.default, ensure_ascii=False)}`"
    elif field.default_factory is dataclasses.MISSING:
        default = "required"
    else:
        made = field.default_factory()
        default = "default: its defaults" if dataclasses.is_dataclass(made) else f"default `{json.dumps(made)}`"
    return f"- **`{key}`** ({words}; {default}){': ' if text else ''}{text.replace('``', '`')}"


def _nested(kind: type) -> list[type]:
    """Return a settings class and those of its fields, each after the one that has it."""
    found = [kind]
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found += [each for each in _nested(typing.cast(type, part)) if each not in found]
    return found


def _summary(kind: type) -> str:
    """Return the first paragraph of a class docstring."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _docstrings(kind: type) -> dict[str, str]:
    """Return every field of a class with the docstring below it, each on one line."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    texts = {field.name: "" for field in dataclasses.fields(kind)}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
