"""Messages of a conversation as training rows, evaluation and requests give them, checked and made equal.

The fields are those of OpenAI's API and fine-tuning files: "role", "content", "tool_calls", "weight", and whatever else
a chat template reads.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.checking import nearest
from shadowtune.errors import DataError

Message = Mapping[str, Any]
"""One turn of a conversation: "role", "content" (text; None beside "tool_calls"), and what else a template reads."""

RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Names that ``chat_template_kwargs`` may not use: they say how the template is applied, or are the conversation."""


def read_messages(messages: Any, name: str, place: str) -> list[Message]:
    """Check a list of messages and return it as chat templates take it.

    The arguments of tool calls become mappings where they are JSON texts, as OpenAI's API writes them.

    Args:
        messages: what the field holds.
        name: of the field, in errors.
        place: names the row, in errors.

    Raises:
        DataError: naming the place, the message and what is wrong with it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{place}: {name} must be a list of messages, got {shorten(messages)}")
    return [_read(message, number, name, place) for number, message in enumerate(messages, start=1)]


def _read(message: Any, number: int, name: str, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: message {number} of {name} must hold role and content, got {shorten(message)}")
    calls = message.get("tool_calls")
    for key in ("role", "content"):
        if key == "content" and calls and message.get("content") is None:
            continue
        if key not in message:
            known = f"{nearest(key, map(str, message))}; it has {', '.join(map(repr, message)) or 'no fields'}"
            raise DataError(f"{place}, message {number} of {name}: no field {key!r}{known}")
        if not isinstance(message[key], str):
            hint = " (null is for messages with tool_calls)" if message[key] is None else ""
            raise DataError(f"{place}: {key} of message {number} must be text, got {shorten(message[key])}{hint}")
    if message.get("weight") not in (None, 0, 1):
        raise DataError(
            f"{place}: weight of message {number} must be 0 (not learned) or 1, got {shorten(message['weight'])}"
        )
    if not calls:
        return message
    return {
        **message,
        "tool_calls": [_read_call(call, number, place) for call in json_list(calls, "tool_calls", place)],
    }


def _read_call(call: Any, number: int, place: str) -> Any:
    """Return a tool call whose arguments are a mapping."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call of message {number} has no function with a name: {shorten(call)}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        arguments = json.loads(arguments)
    except ValueError:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def is_learned(message: Message) -> bool:
    """Say whether a message is an answer that is to be learned: the assistant's, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def json_list(value: Any, name: str, place: str) -> list[Any]:
    """Return a list of mappings, which some data sets keep as JSON text; raises DataError if it is anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{place}: {name} must be a list, or one as JSON text, got {shorten(value)}") from None
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise DataError(f"{place}: {name} must be a list of objects, got {shorten(value)}")
    return value


def read_template_kwargs(value: Any, place: str) -> dict[str, Any]:
    """Return the arguments that a chat template is given by name.

    Raises:
        DataError: if they are no mapping, or one would change how the template is applied.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: chat_template_kwargs must be an object, got {shorten(value)}")
    reserved = sorted(RESERVED & set(map(str, value)))
    if reserved:
        raise DataError(f"{place}: chat_template_kwargs may not hold {', '.join(reserved)}")
    return {str(name): each for name, each in value.items()}


def shorten(value: Any) -> str:
    """Show a value in a message, no more than 60 characters of it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
