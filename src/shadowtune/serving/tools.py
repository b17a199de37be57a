"""Functions that a model may call: the schema of a call that must come, and calls read out of what the model says.

Models write calls in few ways, and all of them are read, whichever the chat template asks for:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>       Hermes, Qwen, SmolLM
    {"name": ..., "parameters": {...}}                             Llama 3; our own, where a call must come
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]               Mistral

Markers that are special tokens are no text, so a call may also stand by itself.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shadowtune.serving.requests import Piece, ToolCall

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
MARKERS = (OPENING, MISTRAL)


def call_schema(tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of the tools."""
    choices = []
    for tool in tools:
        function = tool["function"]
        properties = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        }
        choices.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


class CallReader:
    """Reads the calls of one answer while it comes.

    Text goes on at once as long as it cannot be a call; what may be one is held back until it is whole.

    Args:
        names: of the functions that may be called; a call of another one is text.
        single: whether only the first call is taken.
    """

    def __init__(self, names: Sequence[str], single: bool = False) -> None:
        self._names, self._single = frozenset(names), single
        self._held = ""
        self._begun = False
        self._calls = 0

    def read(self, piece: Piece) -> Piece:
        """Return a piece with the text that is no call, and with the calls that have become whole."""
        if piece.tool_calls:  # the endpoint has read them
            self._calls += len(piece.tool_calls)
            return piece
        self._held += piece.text
        text, calls = self._take(ended=piece.finish_reason is not None)
        reason = piece.finish_reason
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return replace(piece, text=text, tool_calls=tuple(calls), finish_reason=reason)

    def _take(self, ended: bool) -> tuple[str, list[ToolCall]]:
        """Take what is decided from the held text."""
        said, calls = "", list[ToolCall]()
        while self._held:
            start = self._start()
            before, rest = self._held[:start], self._held[start:]
            said += before
            self._begun |= bool(before.strip())
            self._held = rest
            if not rest:
                break
            end = rest.find(CLOSING) if rest.startswith(OPENING) else -1
            if end < 0 and not ended:
                break
            block = rest if end < 0 else rest[: end + len(CLOSING)]
            self._held = rest[len(block) :]
            found = self._calls_of(block)
            calls += found
            if not found:
                said += block
                self._begun = True
        return (said.rstrip() if calls and not said.strip() else said), calls

    def _start(self) -> int:
        """Index in the held text from which on it may be a call; its length if there is none."""
        if not self._begun:
            stripped = self._held.lstrip()
            if not stripped or stripped[0] in "{[":
                return len(self._held) - len(stripped) if stripped else 0 if not self._calls else len(self._held)
        found = [index for marker in MARKERS if (index := self._held.find(marker)) >= 0]
        if found:
            return min(found)
        partial = (size for marker in MARKERS for size in range(len(marker) - 1, 0, -1) if self._ends(marker[:size]))
        return len(self._held) - max(partial, default=0)

    def _ends(self, prefix: str) -> bool:
        return self._held.endswith(prefix)

    def _calls_of(self, block: str) -> list[ToolCall]:
        """Return the calls that a block of text is; none if it is something else."""
        text = block.strip().removeprefix(OPENING).removeprefix(MISTRAL).removesuffix(CLOSING).strip()
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            return []
        entries = told if isinstance(told, list) else [told]
        pairs = [_pair(entry) for entry in entries]
        known = [pair for pair in pairs if pair is not None and pair[0] in self._names]
        if not known or len(known) < len(entries):
            return []
        calls = []
        for name, arguments in known:
            if self._single and self._calls:
                break
            calls.append(ToolCall(self._calls, arguments, f"call_{uuid.uuid4().hex[:24]}", name))
            self._calls += 1
        return calls


def _pair(entry: Any) -> tuple[str, str] | None:
    """Name and arguments of a call as JSON; None if it is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        return entry["name"], arguments
    if not isinstance(arguments, dict):
        return None
    return entry["name"], json.dumps(arguments, ensure_ascii=False)
