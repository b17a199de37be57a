import json

import pytest

from shadowtune.serving.requests import OutputChunk, Usage
from shadowtune.serving.tools import ToolCallParser, call_schema

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'


def read(text, size=1, names=("weather", "time"), **settings):
    """Feed a text in pieces of ``size`` characters; return what was said, the calls and the reason."""
    parser = ToolCallParser(names, **settings)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    pieces = [parser.parse(OutputChunk(part)) for part in parts] + [
        parser.parse(OutputChunk("", (), "stop", Usage(1, 1)))
    ]
    calls = [call for piece in pieces for call in piece.tool_calls]
    return "".join(piece.text for piece in pieces), calls, pieces[-1].finish_reason


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"<tool_call>{CALL}</tool_call>\n",
        f"<tool_call>\n{CALL}",  # cut at its end token
        CALL,
        f"  {CALL}",
        CALL.replace("arguments", "parameters"),
        f"[{CALL}]",
        f"[TOOL_CALLS] [{CALL}]",
    ],
)
def test_every_way_of_writing_a_call_is_read(text, size):
    said, calls, reason = read(text, size)
    assert said.strip() == "" and reason == "tool_calls"
    (call,) = calls
    assert (call.index, call.name, json.loads(call.arguments)) == (0, "weather", {"city": "Ulm"})
    assert call.id.startswith("call_")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_words_before_calls_stay_words_and_calls_are_numbered(size):
    text = f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL.replace('weather', 'time')}</tool_call>"
    said, calls, reason = read(text, size)
    assert said.strip() == "Let me see." and reason == "tool_calls"
    assert [(call.index, call.name) for call in calls] == [(0, "weather"), (1, "time")]
    assert len(read(text, size, single=True)[1]) == 1


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "Ulm is < 100 km away",
        "a <tool",
        "<tool_call>no JSON</tool_call> and on",
        '{"city": "Ulm"}',
        '{"name": "other", "arguments": {}}',
        '{"name": "weather", "arguments": 7}',
        "[1, 2]",
        "{",
        "",
        "   ",
        "[" * 100_000,
    ],
)
def test_everything_else_is_text(text, size):
    size = max(size, len(text) // 1000)
    assert read(text, size) == (text, [], "stop")


def test_words_that_are_no_call_are_not_held_back():
    parser = ToolCallParser(["weather"])
    assert [parser.parse(OutputChunk(word)).text for word in ("Ulm", " is", " a <", " city")] == [
        "Ulm",
        " is",
        " a ",
        "< city",
    ]


def test_the_schema_of_a_call_names_the_tools():
    one = call_schema([WEATHER])
    assert one["properties"]["name"] == {"const": "weather"} and one["required"] == ["name", "arguments"]
    other = {"type": "function", "function": {"name": "time"}}
    both = call_schema([WEATHER, other])["anyOf"]
    assert [schema["properties"]["name"]["const"] for schema in both] == ["weather", "time"]
    assert both[1]["properties"]["arguments"] == {"type": "object"}
