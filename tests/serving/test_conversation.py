"""Tools and template variables in a request's prompt."""

import json

import pytest

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.serving.conversation import chat_token_ids
from shadowtune.serving.requests import GenerationRequest, RequestError
from tests.support.tokenizers import CHATML, tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
USER = [{"role": "user", "content": "tea"}]
CALLED = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "sunny"},
]
WITH_TOOLS = (
    "{% if tools %}tools {{ tools[0].function.name }}{% endif %}"
    "{% for message in messages %}{{ message.role }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %} calls {{ call.function.arguments.city }}{% endfor %} {% endfor %}"
)


def text(template, messages=USER, tools=(TOOL,), prompt_format=None, **fields):
    tokenizer = tiny_tokenizer(template, more='<>{}[]"_/()')
    request = GenerationRequest("m", messages=messages, tools=tools, **fields)
    return tokenizer.decode(chat_token_ids(request, prompt_format or PromptFormat(), tokenizer))


def test_tools_go_through_the_models_template():
    assert text(WITH_TOOLS) == "tools weatheruser tea "
    assert text(WITH_TOOLS, tool_choice="none") == "user tea "
    assert text(WITH_TOOLS, CALLED) == "tools weatheruser tea assistant  calls Ulm tool sunny "


def test_a_template_that_reads_no_tools_gets_them_as_a_system_message():
    told = text(CHATML)
    assert told.startswith("<|im_start|>system\n") and json.dumps(TOOL) in told and "<tool_call>" in told
    both = text(CHATML, [{"role": "system", "content": "be short"}, *USER])
    assert both.startswith("<|im_start|>system\nbe short\n\n") and both.count("system\n") == 1
    said = text(CHATML, CALLED)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in said
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>" in said


def test_a_developers_words_are_the_systems():
    messages = [{"role": "developer", "content": "be short"}, *USER]
    assert text(CHATML, messages, ()).startswith("<|im_start|>system\nbe short")


def test_template_variables_arrive():
    template = "{{ mood }}{% for message in messages %}{{ message.content }}{% endfor %}"
    assert text(template, tools=(), chat_template_kwargs={"mood": "calm"}) == "calmtea"


def test_the_runs_own_template_stays_around_the_words():
    said = text(WITH_TOOLS, prompt_format=PromptFormat("make {drink} now"))
    assert said == "tools weatheruser make tea now "


@pytest.mark.parametrize(
    ("template", "fields", "said"),
    [
        (None, {}, "tools cannot reach it"),
        (None, {"tools": (), "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs cannot reach it"),
        (CHATML, {"tools": (), "chat_template_kwargs": {"tokenize": True}}, "may not hold tokenize"),
        (CHATML, {"messages": [{"role": "user", "content": " "}]}, "no text"),
        ("{{ raise_exception('no tools here') }}", {}, "refuses the messages: no tools here"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(template, fields, said):
    with pytest.raises(DataError, match=said):
        text(template, **fields)


def test_arguments_that_are_no_json_are_refused():
    messages = json.loads(json.dumps(CALLED))
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match="not JSON"):
        text(CHATML, messages)
