"""Recognize the format of a row by its columns, and read it into an example.

In all functions ``where`` names the row in error messages. A template or named fields (``FieldNames``) decide before
the columns do.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shadowtune.config.data import parse_template
from shadowtune.config.settings import nearest
from shadowtune.data.examples import (
    ChatMessage,
    Completion,
    Conversation,
    Example,
    FieldNames,
    PlainText,
    fill_template,
    json_list,
    read_messages,
    read_template_kwargs,
    require_field,
    shorten,
    text_field,
    user_message,
)
from shadowtune.data.files import named_columns
from shadowtune.data.sources import Row
from shadowtune.errors import DataError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""Names of "from" -> roles; others, such as system, are the same."""
LABEL_LIKE = frozenset({"label", "labels", "category", "class", "intent", "sentiment", "target", "topic", "tag"})
"""Column names for which an error message suggests a class rather than an answer."""


@dataclass(frozen=True)
class RowFormat:
    """A format of rows, recognized by columns that all are there."""

    title: str
    unit: str
    """What one row is, in the plural."""
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    """Further columns that are read."""
    read: Callable[[Mapping[str, Any], FieldNames, str], Example]


def read_example(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    """Read a row for causal language modelling.

    A template or named fields decide; otherwise the first of ``FORMATS`` whose columns the row has.

    Raises:
        DataError: if the row has none of these or they have the wrong type.
    """
    found = recognize(row, fields)
    if found is None:
        raise DataError(f"{where}: no format fits the columns {named_columns(row)}; {_suggest(row)}")
    return found.read(row, fields, where)


def recognize(row: Mapping[str, Any], fields: FieldNames) -> RowFormat | None:
    """Return the format of a row; None if its columns fit none."""
    if fields.template is not None:
        return _TEMPLATE
    if fields.prompt is not None or fields.completion is not None:
        return _PAIR
    if fields.label is not None:
        return _LABELLED
    if fields.text is not None:
        return _TEXT
    return next((each for each in FORMATS if all(name in row for name in each.columns)), None)


def describe_formats(rows: Sequence[Mapping[str, Any]], fields: FieldNames, classify: bool = False) -> str:
    """Say how rows are read: "ShareGPT: 4,000 conversations"; several formats with the count of each."""
    if classify:
        return f"texts with labels: {len(rows):,} examples"
    kinds = {tuple(row): recognize(row, fields) for row in {tuple(row): row for row in rows}.values()}
    counts = Counter(found for found in (kinds[tuple(row)] for row in rows) if found is not None)
    return "; ".join(f"{found.title}: {count:,} {found.unit}" for found, count in counts.most_common())


def unread_fields(row: Mapping[str, Any], fields: FieldNames, classify: bool = False) -> set[str]:
    """Return the names of a row's fields that nothing reads."""
    filled = set() if fields.template is None else {name for _, name in parse_template(fields.template) if name}
    if classify:
        return set(map(str, row)) - (filled or {fields.text or "text"}) - {fields.label or "label"}
    found = recognize(row, fields)
    names = {"prompt": fields.prompt, "completion": fields.completion, "text": fields.text, "label": fields.label}
    read = filled if found is None else filled | {names.get(name) or name for name in found.columns} | {*found.optional}
    return set(map(str, row)) - read


def describe_unread(names: Sequence[str]) -> str:
    """Name fields that nothing reads, the first ten of many, with the setting for one that may be a label."""
    rest = f" and {len(names) - 10:,} others" if len(names) > 10 else ""
    like = next((name for name in names if name.lower() in LABEL_LIKE), None)
    hint = "" if like is None else f" (if it is a label, set data.columns.label={like})"
    return ", ".join(names[:10]) + rest + hint


def read_labelled(row: Mapping[str, Any], fields: FieldNames, where: str) -> tuple[str, Any]:
    """Read the text of a row and its label as it is; raises DataError if one is missing or the text is none."""
    name = fields.label or "label"
    if fields.template is not None:
        text = fill_template(fields.template, row, where, fields.optional)
    else:
        text = _hinted(row, fields.text or "text", where)
    label = _hinted(row, name, where, text=False)
    if label is None or label == "" or label != label:
        raise DataError(f"{where}: the label ({name}) is missing; give every row one, or leave the row out")
    return text, label


def label_text(label: Any, row: Mapping[str, Any], fields: FieldNames, where: str) -> str:
    """Return a label as text: its class name if there are names for numbers."""
    name = fields.label or "label"
    names = fields.label_names or (row.classes.get(name) if isinstance(row, Row) else None)
    if names is not None and type(label) is int:
        if label not in range(len(names)):
            raise DataError(f"{where}: {name} is {label}, and there are names for 0 to {len(names) - 1} only")
        return names[label]
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, list):
        return ", ".join(label_text(each, row, fields, where) for each in label)
    return text_field({name: label}, name, where)


def _hinted(row: Mapping[str, Any], name: str, where: str, text: bool = True) -> Any:
    if name not in row:
        raise DataError(
            f"{where}: no field {name!r}{nearest(name, map(str, row))}; it has {named_columns(row)}. Name the columns: "
            "data.columns.text=COLUMN data.columns.label=COLUMN"
        )
    return text_field(row, name, where) if text else row[name]


def _suggest(row: Mapping[str, Any]) -> str:
    """Return the setting that makes a row readable, with its own columns if there are two."""
    names = [*map(str, row)]
    if len(names) == 1:
        return f"if it is text to learn, set data.columns.text={names[0]} (all formats: docs/data.md)"
    if len(names) != 2:
        columns = "data.columns.prompt=COLUMN data.columns.completion=COLUMN"
        return f"name its columns with {columns}, or give a data.template (all formats: docs/data.md)"
    first, second = names if names[0].lower() not in LABEL_LIKE else names[::-1]
    if second.lower() in LABEL_LIKE:
        return f"if these are texts and labels, set data.columns.text={first} data.columns.label={second}"
    pair = f"data.columns.prompt={first} data.columns.completion={second}"
    return f"if these are questions and answers, set {pair} (all formats: docs/data.md)"


def _read_template(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    assert fields.template is not None
    prompt = fill_template(fields.template, row, where, fields.optional)
    completion = text_field(row, fields.completion or "completion", where)
    return Completion(prompt, completion, **_chat_arguments(row, fields, where))


def _read_pair(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    """Prompt and completion are both text or, as in TRL, both lists of messages."""
    prompt, completion = fields.prompt or "prompt", fields.completion or "completion"
    extra = _chat_arguments(row, fields, where)
    if not isinstance(require_field(row, prompt, where), list):
        return Completion(text_field(row, prompt, where), text_field(row, completion, where), **extra)
    asked = read_messages(row[prompt], prompt, where)
    answered = read_messages(require_field(row, completion, where), completion, where)
    return Conversation([*asked, *answered], first_learned=len(asked), **extra)


def _read_chat(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    messages = _read_turns(row, "messages", where)
    return Conversation(_with_system(row, messages, where), **_chat_arguments(row, fields, where))


def _read_sharegpt(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    """A first turn of the assistant answers nothing, and is read but not learned."""
    messages = _read_turns(row, "conversations", where)
    if messages[0]["role"] == "assistant":
        messages = [{**messages[0], "weight": 0}, *messages[1:]]
    return Conversation(_with_system(row, messages, where), **_chat_arguments(row, fields, where))


def _read_alpaca(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    """The prompt is the instruction and, below an empty line, the input if there is one."""
    prompt = fill_template("{instruction}\n\n{input}", row, where, ("input",))
    answer, extra = text_field(row, "output", where), _chat_arguments(row, fields, where)
    if not row.get("system"):
        return Completion(prompt, answer, **extra)
    messages = [user_message(prompt), {"role": "assistant", "content": answer}]
    return Conversation(_with_system(row, messages, where), **extra)


def _read_preference(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    """The chosen answer is learned, of a whole conversation its last turn."""
    chosen, prompt, extra = row["chosen"], row.get("prompt"), _chat_arguments(row, fields, where)
    if not isinstance(chosen, list):
        if prompt is None:
            raise DataError(f"{where}: chosen is text, so the row needs a prompt beside it")
        return Completion(text_field(row, "prompt", where), text_field(row, "chosen", where), **extra)
    answer = read_messages(chosen, "chosen", where)
    before: list[ChatMessage] = []
    if answer[0]["role"] == "assistant" and prompt is not None:
        whole = isinstance(prompt, list)
        before = read_messages(prompt, "prompt", where) if whole else [user_message(text_field(row, "prompt", where))]
    messages = [*before, *answer]
    return Conversation(messages, first_learned=len(messages) - 1, **extra)


def _read_labelled(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    text, label = read_labelled(row, fields, where)
    return Completion(text, label_text(label, row, fields, where), **_chat_arguments(row, fields, where))


def _read_text(row: Mapping[str, Any], fields: FieldNames, where: str) -> Example:
    return PlainText(text_field(row, fields.text or "text", where))


def _read_turns(row: Mapping[str, Any], name: str, where: str) -> list[ChatMessage]:
    """Read a list of messages, or JSON text of one; "from" and "value" of ShareGPT become role and content."""
    turns = row[name]
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = json_list(turns, name, where)
    if isinstance(turns, list):
        turns = [_from_sharegpt(turn, where) for turn in turns]
    return read_messages(turns, name, where)


def _from_sharegpt(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    speaker, value = turn["from"], turn["value"]
    rest = {key: each for key, each in turn.items() if key not in ("from", "value")}
    if speaker in ("function_call", "tool_call"):
        return {**rest, "role": "assistant", "content": None, "tool_calls": _function_calls(value, where)}
    return {**rest, "role": SHAREGPT_ROLES.get(speaker, speaker), "content": value}


def _function_calls(value: Any, where: str) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"{where}: a function_call is JSON of name and arguments, got {shorten(value)}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _with_system(row: Mapping[str, Any], messages: Sequence[ChatMessage], where: str) -> list[ChatMessage]:
    system = text_field(row, "system", where) if row.get("system") else ""
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def _chat_arguments(row: Mapping[str, Any], fields: FieldNames, where: str) -> dict[str, Any]:
    tools, given = row.get("tools") or None, row.get("chat_template_kwargs")
    own = {} if given is None else read_template_kwargs(given, where)
    return {
        "tools": None if tools is None else json_list(tools, "tools", where) or None,
        "template_kwargs": {**fields.template_kwargs, **own},
    }


_CHAT = ("tools", "chat_template_kwargs")
_TEMPLATE = RowFormat("a template", "examples", ("completion",), _CHAT, _read_template)
_PAIR = RowFormat("prompt and completion", "examples", ("prompt", "completion"), _CHAT, _read_pair)
_LABELLED = RowFormat("text and label (learned as answers)", "examples", ("text", "label"), _CHAT, _read_labelled)
_TEXT = RowFormat("plain text", "texts", ("text",), (), _read_text)
_PREFERENCE = "preferences, of which the chosen answers are learned (for DPO use TRL)"
FORMATS = (
    RowFormat("chat messages", "conversations", ("messages",), ("system", *_CHAT), _read_chat),
    RowFormat("ShareGPT", "conversations", ("conversations",), ("system", *_CHAT), _read_sharegpt),
    RowFormat(_PREFERENCE, "pairs", ("chosen", "rejected"), ("prompt", *_CHAT), _read_preference),
    _PAIR,
    RowFormat("Alpaca", "examples", ("instruction", "output"), ("input", "system", *_CHAT), _read_alpaca),
    _LABELLED,
    _TEXT,
)
"""Formats in the order in which a row is tried."""
