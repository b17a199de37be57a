"""JSON schemas, tools, echo, usage and tokens over HTTP, with a backend of fixed text."""

import json

import pytest

from shadowtune.serving.requests import OutputChunk, RoutingDecision, Usage
from tests.serving.http.fakes import FakeBackend
from tests.serving.http.test_streaming import events

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}, "description": "of a city"},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


class Says(FakeBackend):
    """Says one text in pieces of three characters."""

    text = CALL

    async def generate(self, request):
        answer = await super().generate(request)
        text = self.text

        class Saying(type(answer)):
            async def __aiter__(self):
                for start in range(0, len(text), 3):
                    yield OutputChunk(text[start : start + 3], usage_so_far=Usage(4, start // 3 + 1))
                yield OutputChunk("", (), "stop", Usage(4, -(-len(text) // 3)))

        return Saying(request, self, RoutingDecision("cloud", "attached"))


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": FORMAT}, SCHEMA),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "text"}}, None),
        ({"tools": [TOOL]}, None),
        ({"tools": [TOOL], "tool_choice": "none"}, None),
    ],
)
def test_the_schema_of_an_answer(asking, chat, fields, schema):
    client = asking()
    assert client.post("/v1/chat/completions", json=chat(**fields)).status_code == 200
    (request,) = client.backend.asked
    assert request.schema == schema and list(request.tools) == fields.get("tools", [])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_is_a_schema(asking, chat, choice):
    client = asking()
    client.post("/v1/chat/completions", json=chat(tools=[TOOL], tool_choice=choice))
    (request,) = client.backend.asked
    assert request.schema["properties"]["name"] == {"const": "weather"} and request.tool_choice == choice


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "not among the tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 7}}}, "schema"),
    ],
)
def test_invalid_tools_and_formats_are_named(asking, chat, fields, said):
    error = asking().post("/v1/chat/completions", json=chat(**fields)).json()["error"]
    assert said in error["message"]


def test_calls_are_read_out_of_the_answer(asking, chat):
    choice = asking(Says()).post("/v1/chat/completions", json=chat(tools=[TOOL])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}


def test_a_stream_gives_them_as_deltas(asking, chat):
    response = asking(Says()).post("/v1/chat/completions", json=chat(tools=[TOOL], stream=True))
    chunks = [json.loads(text)["choices"][0] for text in events(response)[:-1]]
    (delta,) = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert delta[0]["index"] == 0 and delta[0]["function"]["name"] == "weather"
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_without_tools_the_same_words_are_text(asking, chat):
    message = asking(Says()).post("/v1/chat/completions", json=chat()).json()["choices"][0]["message"]
    assert message["content"] == CALL and "tool_calls" not in message


def test_a_conversation_with_calls_and_their_answers(asking, chat):
    client = asking()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    body = chat()
    body["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    _, called, answered = client.backend.asked[0].messages
    assert called["tool_calls"] == [call] and called["content"] is None
    assert answered == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


def test_an_echo_begins_with_the_prompt(asking):
    client = asking()
    body = {"model": "echo", "prompt": ["one two", "three"], "echo": True, "max_tokens": 1}
    assert [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]] == [
        "one twoone",
        "threethree",
    ]
    chunks = events(client.post("/v1/completions", json={**body, "prompt": "one two", "stream": True}))[:-1]
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "one twoone"
    refused = client.post("/v1/completions", json={**body, "logprobs": 1})
    assert refused.status_code == 400 and "leave out echo or logprobs" in refused.json()["error"]["message"]


def test_usage_of_every_event(asking, chat):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = asking(Says()).post("/v1/chat/completions", json=chat(stream=True, stream_options=options))
    usages = [json.loads(text)["usage"] for text in events(response)[:-1]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[-1] == -(-len(CALL) // 3) and len(set(counts)) > 5
    assert {usage["prompt_tokens"] for usage in usages} == {4}


def test_names_of_inner_fields_are_whole(asking, chat):
    client = asking()
    for fields, name in (
        ({"stream": True, "stream_options": {"continuous_usage": True}}, "stream_options.continuous_usage"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"prediction": {"type": "content", "content": [{"type": "text"}]}}, "prediction.content[0].text"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"stop": ["a", 7]}, "stop[1]"),
    ):
        error = client.post("/v1/chat/completions", json=chat(**fields)).json()["error"]
        assert name in error["message"], (name, error)


@pytest.mark.parametrize(("status", "kind"), [(502, "server_error"), (504, "timeout"), (418, "invalid_request_error")])
def test_an_error_in_mid_stream_has_its_type(asking, chat, status, kind):
    from shadowtune.serving.requests import RequestError

    class Breaks(FakeBackend):
        async def generate(self, request):
            answer = await super().generate(request)

            class Breaking(type(answer)):
                async def __aiter__(self):
                    yield OutputChunk("a")
                    raise RequestError("the cloud broke off", status)

            return Breaking(request, self, self.decision)

    response = asking(Breaks()).post("/v1/chat/completions", json=chat(stream=True))
    assert json.loads(events(response)[-1])["error"]["type"] == kind


def test_tokens_are_shown_and_read():
    from starlette.testclient import TestClient

    from shadowtune.config.serving import ServerConfig
    from shadowtune.serving.http.app import create_app
    from tests.serving.engine.support import engine, one_model
    from tests.support.tokenizers import tiny_tokenizer

    app = create_app(engine(one_model()), ServerConfig(), "cloud")
    tokenizer = tiny_tokenizer()
    with TestClient(app) as client:
        told = client.post("/tokenize", json={"model": "a", "prompt": "hot tea"}).json()
        ids = tokenizer("hot tea")["input_ids"]
        assert told == {"tokens": ids, "count": len(ids), "max_model_len": 128}
        assert client.post("/detokenize", json={"model": "a", "tokens": ids}).json() == {"prompt": "hot tea"}
        messages = [{"role": "user", "content": "tea"}]
        told = client.post("/tokenize", json={"model": "base", "messages": messages}).json()["tokens"]
        assert told == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        body = {"model": "a", "prompt": ids, "echo": True, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"].startswith("hot tea")
        assert client.post("/tokenize", json={"model": "nobody", "prompt": "x"}).status_code == 404
        assert client.post("/tokenize", json={"model": "a"}).status_code == 400
        assert client.post("/detokenize", json={"model": "a", "tokens": [10**6]}).status_code == 400


def test_a_server_without_a_tokenizer_responds_404(asking):
    assert asking().post("/tokenize", json={"model": "echo", "prompt": "x"}).status_code == 404
