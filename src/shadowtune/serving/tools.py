"""Tool calls: the JSON schema of a required call, and parsing calls out of generated text.

The parser reads every common format, whichever the chat template asks for:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>       Hermes, Qwen, SmolLM
    {"name": ..., "parameters": {...}}                             Llama 3; also what ``call_schema`` enforces
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}]               Mistral

Markers that are special tokens are not in the text, so a call without markers is read too.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shadowtune.serving.requests import OutputChunk, ToolCall

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
MARKERS = (OPENING, MISTRAL)


def call_schema(tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of the tools."""
    schemas = []
    for tool in tools:
        function = tool["function"]
        properties = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        }
        required = ["name", "arguments"]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        schemas.append(schema)
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


class ToolCallParser:
    """Parses the tool calls of one output while it streams.

    Text is passed on at once unless it may be a call; then it is held back until the call is complete.

    Args:
        names: of the functions that may be called; a call of another one is text.
        single: whether only the first call is taken.
    """

    def __init__(self, names: Sequence[str], single: bool = False) -> None:
        self._names, self._single = frozenset(names), single
        self._held = ""
        self._has_text = False
        self._calls = 0

    def parse(self, chunk: OutputChunk) -> OutputChunk:
        """Return the chunk with the text that is no call, and with the calls that are now complete."""
        if chunk.tool_calls:  # parsed by the remote endpoint
            self._calls += len(chunk.tool_calls)
            return chunk
        self._held += chunk.text
        text, calls = self._take(ended=chunk.finish_reason is not None)
        reason = chunk.finish_reason
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return replace(chunk, text=text, tool_calls=tuple(calls), finish_reason=reason)

    def _take(self, ended: bool) -> tuple[str, list[ToolCall]]:
        """Split complete text and calls off the held text."""
        text, calls = "", list[ToolCall]()
        while self._held:
            start = self._call_start()
            before, rest = self._held[:start], self._held[start:]
            text += before
            self._has_text |= bool(before.strip())
            self._held = rest
            if not rest:
                break
            end = rest.find(CLOSING) if rest.startswith(OPENING) else -1
            if end < 0 and not ended:
                break
            block = rest if end < 0 else rest[: end + len(CLOSING)]
            self._held = rest[len(block) :]
            found = self._parse_block(block)
            calls += found
            if not found:
                text += block
                self._has_text = True
        return (text.rstrip() if calls and not text.strip() else text), calls

    def _call_start(self) -> int:
        """Index from which on the held text may be a call; its length if nowhere."""
        if not self._has_text:
            stripped = self._held.lstrip()
            if not stripped or stripped[0] in "{[":
                return len(self._held) - len(stripped) if stripped else 0 if not self._calls else len(self._held)
        found = [index for marker in MARKERS if (index := self._held.find(marker)) >= 0]
        if found:
            return min(found)
        prefixes = (marker[:size] for marker in MARKERS for size in range(len(marker) - 1, 0, -1))
        return len(self._held) - max((len(part) for part in prefixes if self._held.endswith(part)), default=0)

    def _parse_block(self, block: str) -> list[ToolCall]:
        """Return the calls in a block of text; none if it is not made of known calls alone."""
        text = block.strip().removeprefix(OPENING).removeprefix(MISTRAL).removesuffix(CLOSING).strip()
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return []
        entries = parsed if isinstance(parsed, list) else [parsed]
        pairs = [_name_and_arguments(entry) for entry in entries]
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


def _name_and_arguments(entry: Any) -> tuple[str, str] | None:
    """Name and JSON arguments of a parsed call; None if it is not a call."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        return entry["name"], arguments
    if not isinstance(arguments, dict):
        return None
    return entry["name"], json.dumps(arguments, ensure_ascii=False)
