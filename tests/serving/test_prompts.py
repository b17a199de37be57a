"""Both servers render requests as training does, or refuse what would be lost."""

import pytest
from starlette.testclient import TestClient

from shadowtune.config.serving import ServerConfig
from shadowtune.data.encoding import encode_prompts
from shadowtune.data.examples import FieldNames
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.loading import wrap_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.openai_api import request_body
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.http.app import create_app
from shadowtune.serving.requests import GenerationRequest
from tests.support.chats import PARTS, QWEN3, chat_tokenizer
from tests.support.shadows import perturbed_model

USER = {"role": "user", "content": "sea"}
THOUGHTS = "<think>\n\n</think>\n\n"


def engine(form, tokenizer):
    model = perturbed_model()
    return Engine(model.base, tokenizer, {"tiny": (model, form)}, Limits(speculation=None))


def edge(form, tokenizer):
    return LocalModel(wrap_model(perturbed_model().detached(), tokenizer, form), "tiny")


@pytest.fixture(params=[engine, edge], ids=["cloud", "edge"])
def serve(request):
    opened = []

    def make(form, tokenizer=None):
        backend = request.param(form, tokenizer or chat_tokenizer())
        client = TestClient(create_app(backend, ServerConfig(), "cloud"), raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def chat(client, messages, **fields):
    body = {"model": "tiny", "messages": messages, "max_tokens": 2, "temperature": 0, **fields}
    return client.post("/v1/chat/completions", json=body)


def refusal(reply):
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages" and "\n" not in error["message"]
    return error["message"]


def test_what_a_run_without_chat_template_cannot_read_is_a_400(serve):
    client = serve(PromptFormat("Word: {text}\nIs:", chat_template=False))
    assert chat(client, [USER]).status_code == 200
    history = [USER, {"role": "assistant", "content": "wet"}, USER]
    assert "a system message would be lost" in refusal(chat(client, [{"role": "system", "content": "x"}, USER]))
    assert "earlier turns would be lost" in refusal(chat(client, history))
    assert "chat_template_kwargs" in refusal(chat(client, [USER], chat_template_kwargs={"a": 1}))
    (card, *_) = client.get("/v1/models").json()["data"]
    assert card["conversations"] is False and "fields" not in card


def test_conversations_are_read_where_there_is_a_chat_template(serve):
    client, tokenizer = serve(PromptFormat()), chat_tokenizer()
    messages = [{"role": "system", "content": "be kind"}, USER]
    expected = len(PromptFormat().encode(messages, tokenizer))
    assert chat(client, messages).json()["usage"]["prompt_tokens"] == expected
    assert "conversations" not in client.get("/v1/models").json()["data"][0]


def test_templates_of_several_fields_take_them_by_name(serve):
    form = PromptFormat("{instruction}\n\n{input}", False, ("input",))
    client, tokenizer = serve(form), chat_tokenizer()
    alone = chat(client, [USER]).json()["usage"]["prompt_tokens"]
    both = chat(client, [USER], fields={"input": "blue"}).json()["usage"]["prompt_tokens"]
    assert alone == len(tokenizer("sea")["input_ids"])
    assert both == len(tokenizer("sea\n\nblue")["input_ids"])
    assert "no field 'inptu' (did you mean input?)" in refusal(chat(client, [USER], fields={"inptu": "x"}))
    assert client.get("/v1/models/tiny").json()["fields"] == ["input"]


def test_arguments_of_the_chat_template_reach_it(serve):
    client, tokenizer = serve(PromptFormat(), chat_tokenizer(QWEN3)), chat_tokenizer(QWEN3)
    more = len(tokenizer(THOUGHTS)["input_ids"])
    plain = chat(client, [USER]).json()["usage"]["prompt_tokens"]
    without = chat(client, [USER], chat_template_kwargs={"enable_thinking": False}).json()["usage"]["prompt_tokens"]
    assert without == plain + more
    assert "may not hold chat_template" in refusal(chat(client, [USER], chat_template_kwargs={"chat_template": "x"}))


def test_the_start_of_every_answer_is_prompt_not_answer(serve):
    tokenizer = chat_tokenizer(QWEN3)
    form = PromptFormat(answer_prefix=THOUGHTS)
    rows = [{"prompt": "sea", "completion": "wet"}]
    (trained,) = encode_prompts(rows, tokenizer, FieldNames(), 99, answer_prefix=THOUGHTS)
    reply = chat(serve(form, tokenizer), [USER]).json()
    assert reply["usage"]["prompt_tokens"] == len(trained.input_ids)


def test_a_text_that_the_chat_template_leaves_out_is_a_400(serve):
    assert "leaves out the text of message 1" in refusal(chat(serve(PromptFormat(), chat_tokenizer(PARTS)), [USER]))


@pytest.mark.parametrize("add_bos", [False, True])
def test_completions_read_as_many_tokens_as_training_had(serve, add_bos):
    tokenizer = chat_tokenizer(None, add_bos, add_eos=True)
    rows = [{"prompt": "the sea is", "completion": "wet"}]
    (trained,) = encode_prompts(rows, tokenizer, FieldNames(), 99)
    body = {"model": "tiny", "prompt": "the sea is", "max_tokens": 2}
    reply = serve(PromptFormat(), tokenizer).post("/v1/completions", json=body).json()
    assert reply["usage"]["prompt_tokens"] == len(trained.input_ids)


def test_the_edge_hands_over_all_that_makes_the_prompt():
    asked = {"fields": {"input": "blue"}, "tools": [{"type": "function"}], "chat_template_kwargs": {"a": 1}}
    body = request_body(GenerationRequest("m", messages=[USER], **asked), "m")
    assert {name: body[name] for name in asked} == asked
    assert not set(asked) & set(request_body(GenerationRequest("m", messages=[USER]), "m"))
