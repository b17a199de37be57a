"""What a row says: a conversation, a prompt with its completion, plain text, or a text with its class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shadowtune.config.checking import nearest
from shadowtune.config.data import DataConfig
from shadowtune.config.templates import parse_template
from shadowtune.data.sources import Row
from shadowtune.errors import DataError

Message = Mapping[str, Any]
"""One turn of a conversation: "role" and "content", both text, and whatever else a chat template reads."""


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

    @classmethod
    def from_config(cls, data: DataConfig) -> "FieldNames":
        """Take the names from the settings of a run."""
        return cls(data.prompt_field, data.completion_field, data.text_field, data.label_field, data.template)


@dataclass(frozen=True)
class Conversation:
    """Messages of which the assistant's, from number ``first_learned`` on, are to be learned."""

    messages: Sequence[Message]
    first_learned: int = 0


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is to follow it."""

    prompt: str
    completion: str


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
    if fields.template is not None:
        prompt = fill_template(fields.template, row, place)
        return Completion(prompt, text_of(row, fields.completion or "completion", place))
    if fields.prompt is not None or fields.completion is not None:
        return _read_completion(row, fields.prompt or "prompt", fields.completion or "completion", place)
    if fields.text is not None:
        return Text(text_of(row, fields.text, place))
    if "messages" in row:
        return Conversation(_messages_of(row, "messages", place))
    if "prompt" in row and "completion" in row:
        return _read_completion(row, "prompt", "completion", place)
    if "text" in row:
        return Text(text_of(row, "text", place))
    raise DataError(
        f"{place}: needs messages, or prompt and completion, or text; it has {_keys(row)}. Name its fields with "
        "data.prompt_field, data.completion_field and data.text_field, or give a data.template"
    )


def read_classified(row: Mapping[str, Any], fields: FieldNames, place: str) -> tuple[str, int]:
    """Read the text and the class, a whole number from 0, of a row for classification.

    Raises:
        DataError: naming the place and the field that is missing or holds something else.
    """
    if fields.template is not None:
        text = fill_template(fields.template, row, place)
    else:
        text = text_of(row, fields.text or "text", place)
    name = fields.label or "label"
    label = field_of(row, name, place)
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(f"{place}: {name} must be the number of a class, from 0, got {_short(label)}")
    return text, label


def fill_template(template: str, row: Mapping[str, Any], place: str) -> str:
    """Put a row's fields into a template; ``place`` names the row in errors.

    Raises:
        DataError: if the row lacks a field that the template names, or it is no text.
        ConfigError: if the template is malformed.
    """
    return "".join(
        literal + ("" if name is None else text_of(row, name, place)) for literal, name in parse_template(template)
    )


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """Return a field as text, numbers as they print; raises DataError if it is missing or anything else."""
    value = field_of(row, name, place)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: {name} must be text, got {_short(value)}")
    return str(value)


def field_of(row: Mapping[str, Any], name: str, place: str) -> Any:
    """Return a field; raises DataError, naming the place and what the row has, if it is missing."""
    if name not in row:
        raise DataError(f"{place}: no field {name!r}{nearest(name, map(str, row))}; it has {_keys(row)}")
    return row[name]


def _read_completion(row: Mapping[str, Any], prompt: str, completion: str, place: str) -> Example:
    """Read a prompt and a completion, which are both text or, as in TRL, both lists of messages."""
    if not isinstance(field_of(row, prompt, place), list):
        return Completion(text_of(row, prompt, place), text_of(row, completion, place))
    asked = _messages_of(row, prompt, place)
    return Conversation([*asked, *_messages_of(row, completion, place)], first_learned=len(asked))


def _messages_of(row: Mapping[str, Any], name: str, place: str) -> list[Message]:
    messages = field_of(row, name, place)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {name} must be a list of messages, got {_short(messages)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"{place}: message {number} of {name} must hold role and content, got {_short(message)}")
        for key in ("role", "content"):
            if not isinstance(field_of(message, key, f"{place}, message {number} of {name}"), str):
                raise DataError(f"{place}: {key} of message {number} must be text, got {_short(message[key])}")
    return messages


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def _short(value: Any) -> str:
    """Show a value in a message, no more than 60 characters of it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
