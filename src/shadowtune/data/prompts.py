"""What a row says: a conversation, a prompt with its completion, plain text, or a text with its class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadowtune.config.checking import nearest
from shadowtune.config.data import DataConfig
from shadowtune.config.templates import parse_template
from shadowtune.data.messages import Message, json_list, read_messages, read_template_kwargs, shorten
from shadowtune.data.sources import Row
from shadowtune.errors import DataError


@dataclass(frozen=True)
class FieldNames:
    """Where a row keeps its parts; None means the usual name, which is the attribute's.

    ``template`` makes the prompt (in classification the text) from any fields, as ``DataConfig.template`` says.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | None = None
    template: str | None = None
    optional: tuple[str, ...] = ()
    """Fields of the template that a row may lack."""

    @classmethod
    def from_config(cls, data: DataConfig) -> "FieldNames":
        """Take the names from the settings of a run."""
        names = (data.prompt_field, data.completion_field, data.text_field, data.label_field, data.template)
        return cls(*names, tuple(data.optional_fields))


@dataclass(frozen=True)
class Conversation:
    """Messages of which the assistant's, from number ``first_learned`` on, are to be learned."""

    messages: Sequence[Message]
    first_learned: int = 0
    tools: list[Any] | None = None
    """JSON schemas that the chat template shows."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given."""


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is to follow it."""

    prompt: str
    completion: str
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Plain text, learned whole."""

    text: str


Example = Conversation | Completion | Text


def place_of(row: Mapping[str, Any], index: int) -> str:
    """Name a row for messages: file and line where it has them, else its number, from 1."""
    return f"{row.origin}, line {row.number}" if isinstance(row, Row) else f"row {index + 1}"


def read_example(row: Mapping[str, Any], fields: FieldNames, place: str) -> Example:
    """Read a row for causal language modelling.

    Fields that were named, or a template, decide; else the row has ``messages`` (a list of role and content), or
    ``prompt`` and ``completion`` (both text, or both lists of messages), or ``text``, looked for in this order.

    Raises:
        DataError: naming the place, if the row has none of these or they do not hold what they should.
    """
    extra = _template_arguments(row, place)
    if fields.template is not None:
        prompt = fill_template(fields.template, row, place, fields.optional)
        return Completion(prompt, text_of(row, fields.completion or "completion", place), **extra)
    if fields.prompt is not None or fields.completion is not None:
        return _read_completion(row, fields.prompt or "prompt", fields.completion or "completion", place, extra)
    if fields.text is not None:
        return Text(text_of(row, fields.text, place))
    if "messages" in row:
        return Conversation(read_messages(row["messages"], "messages", place), **extra)
    if "prompt" in row and "completion" in row:
        return _read_completion(row, "prompt", "completion", place, extra)
    if "text" in row:
        return Text(text_of(row, "text", place))
    raise DataError(
        f"{place}: needs messages, or prompt and completion, or text; it has {_keys(row)}. Name its fields with "
        "data.prompt_field, data.completion_field and data.text_field, or give a data.template"
    )


def unread_fields(row: Mapping[str, Any], fields: FieldNames, classify: bool = False) -> set[str]:
    """Return the names of a row's fields that ``read_example`` (or ``read_classified``) does not read."""
    return set(map(str, row)) - _read_names(row, fields, classify)


def _read_names(row: Mapping[str, Any], fields: FieldNames, classify: bool) -> set[str]:
    filled = set() if fields.template is None else {name for _, name in parse_template(fields.template) if name}
    if classify:
        return (filled or {fields.text or "text"}) | {fields.label or "label"}
    chat = {"tools", "chat_template_kwargs"}
    if filled:
        return filled | {fields.completion or "completion"} | chat
    if fields.prompt is not None or fields.completion is not None:
        return {fields.prompt or "prompt", fields.completion or "completion"} | chat
    if fields.text is not None:
        return {fields.text}
    if "messages" in row:
        return {"messages"} | chat
    return {"prompt", "completion"} | chat if "prompt" in row and "completion" in row else {"text"}


def read_classified(row: Mapping[str, Any], fields: FieldNames, place: str) -> tuple[str, int]:
    """Read the text and the class, a whole number from 0, of a row for classification.

    Raises:
        DataError: naming the place and the field that is missing or holds something else.
    """
    if fields.template is not None:
        text = fill_template(fields.template, row, place, fields.optional)
    else:
        text = text_of(row, fields.text or "text", place)
    name = fields.label or "label"
    label = field_of(row, name, place)
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(f"{place}: {name} must be the number of a class, from 0, got {shorten(label)}")
    return text, label


def fill_template(template: str, row: Mapping[str, Any], place: str, optional: Sequence[str] = ()) -> str:
    r"""Put a row's fields into a template; ``place`` names the row in errors.

    An optional field that the row lacks, or that is null or empty, is left out together with the text between the field
    before it and itself: of "{instruction}\n\n{input}" only the instruction is left.

    Raises:
        DataError: if the row lacks a field that the template names and that is not optional, or it is no text.
        ConfigError: if the template is malformed.
    """
    filled = ""
    for literal, name in parse_template(template):
        if name is not None and name in optional and row.get(name) in (None, ""):
            continue
        filled += literal + ("" if name is None else text_of(row, name, place))
    return filled


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """Return a field as text, numbers as they print; raises DataError if it is missing or anything else."""
    value = field_of(row, name, place)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: {name} must be text, got {shorten(value)}")
    return str(value)


def field_of(row: Mapping[str, Any], name: str, place: str) -> Any:
    """Return a field; raises DataError, naming the place and what the row has, if it is missing."""
    if name not in row:
        raise DataError(f"{place}: no field {name!r}{nearest(name, map(str, row))}; it has {_keys(row)}")
    return row[name]


def _template_arguments(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return what a row gives its chat template beside the messages."""
    arguments: dict[str, Any] = {}
    if row.get("tools") is not None:
        arguments["tools"] = json_list(row["tools"], "tools", place) or None
    if row.get("chat_template_kwargs") is not None:
        arguments["template_kwargs"] = read_template_kwargs(row["chat_template_kwargs"], place)
    return arguments


def _read_completion(
    row: Mapping[str, Any], prompt: str, completion: str, place: str, extra: dict[str, Any]
) -> Example:
    """Read a prompt and a completion, which are both text or, as in TRL, both lists of messages."""
    if not isinstance(field_of(row, prompt, place), list):
        return Completion(text_of(row, prompt, place), text_of(row, completion, place), **extra)
    asked = read_messages(row[prompt], prompt, place)
    answered = read_messages(field_of(row, completion, place), completion, place)
    return Conversation([*asked, *answered], first_learned=len(asked), **extra)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"
