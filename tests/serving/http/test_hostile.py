"""Bodies of megabytes, invalid or valid: none blocks the event loop for long.

Nothing here measures time. What a body costs is counted: faults that are looked at, texts that are tokenized, and in
which thread.
"""

import asyncio
import json
import threading

import httpx2
import pytest

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.app import create_app
from shadowtune.serving.http.protocol import ChatCompletionRequest, CompletionRequest
from shadowtune.serving.requests import RequestError
from tests.serving.engine.support import engine, one_model, request, with_engine

USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
MANY = {f"key{number}": 0 for number in range(20_000)}
BAD_PARTS = [{"role": "user", "content": [{"type": "nonsense", "number": 7}] * 40}] * 1_950
HOSTILE = {
    "unknown fields": {"messages": USER, **MANY},
    "bad parts": {"messages": BAD_PARTS},
    "empty parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 60}] * 1_950},
    "fields of a part": {"messages": [{"role": "user", "content": [{"type": "text", "text": "", **MANY}]}]},
    "fields of a prediction": {"messages": USER, "prediction": {"type": "content", "content": "x", **MANY}},
    "fields of stream options": {"messages": USER, "stream": True, "stream_options": MANY},
    "fields of a choice": {"messages": USER, "tool_choice": MANY},
    "biases": {"messages": USER, "logit_bias": MANY},
    "stops": {"messages": USER, "stop": [""] * 100_000},
    "messages": {"messages": [{}] * 100_000},
    "roles": {"messages": [{"role": "robot", "content": 7}] * 4_000},
    "modalities": {"messages": USER, "modalities": [7] * 100_000},
    "tools": {"messages": USER, "tools": [{"type": 7}] * 100_000},
    "template variables": {"messages": USER, "chat_template_kwargs": MANY},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_body_that_is_wrong_everywhere_has_few_errors(fields):
    with pytest.raises(ValueError, match="validation error") as refused:
        ChatCompletionRequest.model_validate({"model": "echo", **fields})
    assert refused.value.error_count() <= 8


@pytest.mark.parametrize(
    "prompt", [[1.5] * 16_384, [[]] * 16_384, [[""] * 100_000], [{}] * 100_000, [[7], "x"] * 8_000]
)
def test_so_is_a_list_of_prompts(prompt):
    with pytest.raises(ValueError, match="validation error") as refused:
        CompletionRequest.model_validate({"model": "echo", "prompt": prompt})
    assert refused.value.error_count() <= 8


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_such_a_body_is_refused_in_one_short_line(asking, fields):
    response = asking().post("/v1/chat/completions", content=json.dumps({"model": "echo", **fields}), headers=JSON)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "\n" not in message and len(message) < 1_000


@pytest.mark.parametrize("inner", ["[]", "{}"])
def test_a_million_objects_are_refused_before_they_are_made(asking, inner, monkeypatch):
    from shadowtune.serving.http import middleware

    monkeypatch.setattr(middleware.pydantic_core, "from_json", lambda *_, **__: pytest.fail("read"))
    body = '{"model": "echo", "prompt": [' + ",".join([inner] * 850_000) + "]}"
    response = asking().post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400 and "850002 opening brackets" in response.json()["error"]["message"]


def test_a_flood_of_prompts_is_refused_before_requests_are_made_of_it(asking, monkeypatch):
    from shadowtune.serving.http import handlers

    monkeypatch.setattr(handlers, "_choices", lambda *_: pytest.fail("made requests"))
    body = {"model": "echo", "prompt": ["a"] * 16_384, "n": 16}
    response = asking(max_requests=80).post("/v1/completions", json=body)
    assert response.status_code == 400 and "262144 answers" in response.json()["error"]["message"]


def test_a_long_text_is_a_prompt(asking):
    client = asking()
    assert client.post("/v1/completions", json={"model": "echo", "prompt": "x" * 100_000}).status_code == 200
    assert client.post("/v1/completions", json={"model": "echo", "prompt": [7] * 16_384}).status_code == 200


class Watched:
    """A tokenizer that counts what it is asked, and where."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **settings):
        if arguments[0]:  # not the empty text, by which the begin token is found
            self.asked.append(threading.current_thread())
        return self.tokenizer(*arguments, **settings)


def watched(served):
    served._processor.validator.tokenizer = Watched(served._processor.validator.tokenizer)
    return served._processor.validator.tokenizer


def test_a_prompt_of_many_answers_is_tokenized_once_and_in_another_thread():
    served = engine(one_model())
    tokenizer = watched(served)
    prompt = "words " * 5

    async def work(each):
        ours = threading.current_thread()
        asked = [request(prompt=prompt, max_tokens=2) for _ in range(16)]
        await asyncio.gather(*(each.generate(one) for one in asked))
        return ours

    ours = with_engine(served, work)
    assert len(tokenizer.asked) == 1 and tokenizer.asked[0] is not ours


@pytest.mark.parametrize("field", ["prompt", "prediction", "messages"])
def test_what_cannot_fit_is_refused_by_its_characters(field):
    served = engine(one_model())
    tokenizer = watched(served)
    long = "x" * 1_000_000
    given = {"messages": [{"role": "user", "content": long}], "prompt": None} if field == "messages" else {field: long}

    async def work(each):
        with pytest.raises(RequestError, match="1000000 characters are more than") as refused:
            await each.generate(request(**given))
        return refused.value.param

    assert with_engine(served, work) == field
    assert not tokenizer.asked


def test_health_answers_while_a_prompt_is_tokenized():
    """The tokenizer waits until /health has been answered, which it could not be if it held up the event loop."""
    served = engine(one_model())
    tokenizer = watched(served)
    answered = threading.Event()
    tokenize = tokenizer.tokenizer

    class Slow(Watched):
        def __call__(self, *arguments, **settings):
            assert answered.wait(60), "the event loop stood still"
            return tokenize(*arguments, **settings)

    served._processor.validator.tokenizer = Slow(tokenize)
    app = create_app(served, ServerConfig(), "cloud", counters=served.counters)

    async def work(each):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"model": "a", "prompt": "words and words", "n": 3, "max_tokens": 2}
            asked = asyncio.ensure_future(client.post("/v1/completions", json=body))
            for _ in range(20):
                await asyncio.sleep(0)
            assert (await client.get("/health")).status_code == 200
            answered.set()
            return (await asked).status_code

    assert with_engine(served, work) == 200


def test_a_cancelled_caller_leaves_the_tokenization_to_the_others():
    from shadowtune.serving.background import SharedWork

    async def run():
        work, go, runs = SharedWork("test"), threading.Event(), []

        def read():
            runs.append(1)
            assert go.wait(60)
            return "read"

        first, second = (asyncio.ensure_future(work.run("key", read)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        go.set()
        result = await second
        assert first.cancelled() or await asyncio.gather(first, return_exceptions=True)
        assert work.close(60)
        return result, runs

    assert asyncio.run(run()) == ("read", [1])
