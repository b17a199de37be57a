"""Examples: a conversation, a prompt with its completion, or plain text; and how their parts are read.

Message fields are those of OpenAI's API and fine-tuning files: "role", "content", "tool_calls", "weight", and whatever
else a chat template reads. In all functions ``where`` names the row in error messages.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import DataConfig, ProblemType, parse_template
from shadowtune.config.settings import nearest
from shadowtune.data.files import named_columns
from shadowtune.errors import DataError

ChatMessage = Mapping[str, Any]
"""One turn of a conversation: "role", "content" (text; may be None beside "tool_calls"), and other template fields."""
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Names that ``chat_template_kwargs`` may not use: parameters of ``apply_chat_template``, and the conversation."""


@dataclass(frozen=True)
class FieldNames:
    """Where a row holds the parts of an example; a name that is None is the attribute's own name.

    ``template`` makes the prompt (in classification the text) from any fields; see ``DataConfig.template``.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | None = None
    template: str | None = None
    optional: tuple[str, ...] = ()
    """Fields of the template that a row may lack."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Default arguments of the chat template; those of a row override them."""
    label_names: tuple[str, ...] | None = None
    """Names of classes by number; None takes those of the data set."""
    label_separator: str | None = None
    """Text between the labels of one row."""
    problem_type: ProblemType | None = None
    """Of the labels; None reads it off them."""

    @classmethod
    def from_config(cls, data: DataConfig) -> "FieldNames":
        """Take the names from the settings of a run."""
        names = (data.prompt_field, data.completion_field, data.text_field, data.label_field, data.template)
        labels: dict[str, Any] = {"label_names": data.label_names, "label_separator": data.label_separator}
        return cls(*names, tuple(data.optional_fields), problem_type=data.problem_type, **labels)


@dataclass(frozen=True)
class Conversation:
    """Messages; the assistant's from index ``first_learned`` on are training targets."""

    messages: Sequence[ChatMessage]
    first_learned: int = 0
    tools: list[Any] | None = None
    """JSON schemas that the chat template shows."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it."""

    prompt: str
    completion: str
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text without a prompt; every token is a training target."""

    text: str


Example = Conversation | Completion | PlainText


def fill_template(template: str, row: Mapping[str, Any], where: str, optional: Sequence[str] = ()) -> str:
    r"""Put the fields of a row into a template.

    An optional field that is missing, null or empty is left out together with the literal text before it: with
    "{instruction}\n\n{input}" only the instruction remains.

    Raises:
        DataError: if a required field is missing or no text.
        ConfigError: if the template is malformed.
    """
    filled = ""
    for literal, name in parse_template(template):
        if name is not None and name in optional and row.get(name) in (None, ""):
            continue
        filled += literal + ("" if name is None else text_field(row, name, where))
    return filled


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field as text (numbers are formatted); raises DataError if it is missing, NaN or of another type."""
    value = require_field(row, name, where)
    if value is None or value != value:  # NaN is what other libraries write for an empty cell
        raise DataError(f"{where}: {name} must be text, got {value}: the cell is empty; fill it, or leave the row out")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {name} must be text, got {shorten(value)}")
    return str(value)


def require_field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a field; raises DataError, listing the row's fields, if it is missing."""
    if name not in row:
        raise DataError(f"{where}: no field {name!r}{nearest(name, map(str, row))}; it has {named_columns(row)}")
    return row[name]


def read_messages(messages: Any, name: str, where: str) -> list[ChatMessage]:
    """Validate a list of messages; JSON text in the arguments of tool calls becomes a mapping.

    Args:
        messages: the value of the field.
        name: of the field, for errors.
        where: names the row, for errors.

    Raises:
        DataError: naming the message and what is wrong with it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: {name} must be a list of messages, got {shorten(messages)}")
    return [_read_message(message, number, name, where) for number, message in enumerate(messages, start=1)]


def _read_message(message: Any, number: int, name: str, where: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: message {number} of {name} must hold role and content, got {shorten(message)}")
    if isinstance(message.get("content"), list):
        message = {**message, "content": _join_parts(message["content"], number, where)}
    calls = message.get("tool_calls")
    for key in ("role", "content"):
        if key == "content" and calls and message.get("content") is None:
            continue
        if key not in message:
            known = f"{nearest(key, map(str, message))}; it has {named_columns(message)}"
            raise DataError(f"{where}, message {number} of {name}: no field {key!r}{known}")
        if not isinstance(message[key], str):
            hint = " (null is for messages with tool_calls)" if message[key] is None else ""
            raise DataError(f"{where}: {key} of message {number} must be text, got {shorten(message[key])}{hint}")
    if message.get("weight") not in (None, 0, 1):
        raise DataError(
            f"{where}: weight of message {number} must be 0 (not learned) or 1, got {shorten(message['weight'])}"
        )
    if not calls:
        return message
    calls = json_list(calls, "tool_calls", where)
    return {**message, "tool_calls": [_read_tool_call(call, number, where) for call in calls]}


def _join_parts(parts: list[Any], number: int, where: str) -> str:
    """Return the text of a content in parts, one below the other."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: content of message {number} must be text, or parts of type text, got {shorten(part)}"
            )
    return "\n".join(part["text"] for part in parts)


def _read_tool_call(call: Any, number: int, where: str) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call of message {number} has no function with a name: {shorten(call)}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        arguments = json.loads(arguments)
    except ValueError:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def user_message(text: str) -> ChatMessage:
    """Return a text as a message of role "user"."""
    return {"role": "user", "content": text}


def is_target(message: ChatMessage) -> bool:
    """Whether a message is a training target: the assistant's, with a weight other than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def json_list(value: Any, name: str, where: str) -> list[Any]:
    """Return a list of mappings, which may be given as JSON text; raises DataError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: {name} must be a list, or one as JSON text, got {shorten(value)}") from None
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise DataError(f"{where}: {name} must be a list of objects, got {shorten(value)}")
    return value


def read_template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """Validate keyword arguments of a chat template; raises DataError if one of them is reserved."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: chat_template_kwargs must be an object, got {shorten(value)}")
    reserved = sorted(RESERVED & set(map(str, value)))
    if reserved:
        raise DataError(f"{where}: chat_template_kwargs may not hold {', '.join(reserved)}")
    return {str(name): each for name, each in value.items()}


def shorten(value: Any) -> str:
    """Return the repr of a value, cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
