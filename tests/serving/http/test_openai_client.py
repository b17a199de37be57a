"""The official client, unchanged, against a real server."""

import pytest

openai = pytest.importorskip("openai")

from shadowtune.config.serving import ServerConfig, hash_key  # noqa: E402
from tests.serving.http.fakes import FakeBackend, eventually, serving  # noqa: E402

HELLO = [{"role": "user", "content": "to be or not"}]


@pytest.fixture(scope="module")
def live():
    with serving(config=ServerConfig(port=0, key_hashes=(hash_key("good-key"),), timeout=1.0)) as live:
        yield live


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="good-key", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(live, client):
    reply = client.chat.completions.create(
        model="echo", messages=[{"role": "developer", "content": "be short"}, *HELLO], temperature=0.25, top_p=0.5
    )
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "to be or not", "stop")
    assert reply.object == "chat.completion" and reply.model == "echo" and reply.id.startswith("chatcmpl-")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (4, 4, 8)
    request = live.backend.asked[-1]
    assert request.messages == [{"role": "developer", "content": "be short"}, HELLO[0]]
    assert (request.sampling.temperature, request.sampling.top_p, request.max_tokens) == (0.25, 0.5, None)


def test_parts_of_a_message_are_put_together(live, client):
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]
    reply = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": parts}])
    assert reply.choices[0].message.content == "a b c"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_ends_at_its_limit(client, limit):
    reply = client.chat.completions.create(model="echo", messages=HELLO, **{limit: 2})
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("to be", "length")


def test_a_chat_streams(client):
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "to be or not"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_its_usage_if_asked(client):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="echo", messages=HELLO, stream=True, stream_options=options))
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_clients_own_stream_helper_works(client):
    with client.chat.completions.stream(model="echo", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == "to be or not"


@pytest.mark.parametrize("stop", ["or", ["or", "not"]])
def test_stop_texts_arrive(client, stop):
    reply = client.chat.completions.create(model="echo", messages=HELLO, stop=stop)
    assert reply.choices[0].message.content == "to be"


def test_several_choices_have_a_seed_each(live, client):
    reply = client.chat.completions.create(model="echo", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [request.sampling.seed for request in live.backend.asked[-3:]] == [7, 8, 9]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 12)  # one prompt, three answers


def test_streamed_choices_keep_apart(client):
    said = {0: "", 1: ""}
    ends = []
    for chunk in client.chat.completions.create(model="echo", messages=HELLO, n=2, stream=True):
        (choice,) = chunk.choices
        said[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert said == {0: "to be or not", 1: "to be or not"} and sorted(ends) == [0, 1]


def test_logprobs_of_a_chat(client):
    reply = client.chat.completions.create(model="echo", messages=HELLO, logprobs=True, top_logprobs=2)
    first, *_, last = reply.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("to", -0.5, [116, 111])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("t0", 0.0), ("t1", -1.0)]
    assert (last.token, last.logprob) == (" not", -2.0)


def test_logprobs_of_a_streamed_chat_come_with_their_tokens(client):
    chunks = client.chat.completions.create(model="echo", messages=HELLO, logprobs=True, stream=True)
    told = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in told] == ["to", " be", " or", " not"]


def test_a_probability_of_zero_is_a_number(client):
    messages = [{"role": "user", "content": "never"}]
    reply = client.chat.completions.create(model="echo", messages=messages, logprobs=True)
    assert reply.choices[0].logprobs.content[0].logprob == -9999.0


def test_a_prediction_is_handed_on_and_counted(live, client):
    prediction = {"type": "content", "content": "to be or"}
    reply = client.chat.completions.create(model="echo", messages=HELLO, prediction=prediction)
    details = reply.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (3, 1)
    assert live.backend.asked[-1].prediction == "to be or"


def test_a_text_is_completed(live, client):
    reply = client.completions.create(model="echo", prompt="one two three", max_tokens=2, logprobs=1)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, reply.object) == ("one two", "length", "text_completion")
    assert choice.logprobs.tokens == ["one", " two"] and choice.logprobs.text_offset == [0, 3]
    assert choice.logprobs.token_logprobs == [-0.5, -1.0] and choice.logprobs.top_logprobs == [{"t0": 0.0}] * 2
    assert live.backend.asked[-1].prompt == "one two three"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a b", ["a b"]),
        (["a b", "c"], ["a b", "c"]),
        ([5, 6, 7], ["5 6 7"]),
        ([[5, 6], [7]], ["5 6", "7"]),
    ],
)
def test_every_kind_of_prompt(client, prompt, said):
    reply = client.completions.create(model="echo", prompt=prompt)
    assert [choice.text for choice in reply.choices] == said


def test_several_answers_to_several_texts(client):
    reply = client.completions.create(model="echo", prompt=["a", "b c"], n=2)
    assert [choice.text for choice in reply.choices] == ["a", "a", "b c", "b c"]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 6)


def test_a_completion_streams_with_offsets(client):
    chunks = list(client.completions.create(model="echo", prompt="one two", stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices[0].logprobs] == [[0], [3]]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_completion_has_sixteen_tokens_by_default(live, client):
    client.completions.create(model="echo", prompt="a")
    assert live.backend.asked[-1].max_tokens == 16


def test_models_are_listed_and_described(client):
    assert "echo" in [model.id for model in client.models.list()]
    model = client.models.retrieve("echo")
    assert (model.id, model.object, model.created) == ("echo", "model", 1700000000)
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        client.models.retrieve("nobody")


def test_fields_that_change_nothing_are_taken(client):
    client.chat.completions.create(
        model="echo",
        messages=HELLO,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        response_format={"type": "text"},
        modalities=["text"],
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "speculate": False},
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"audio": {"voice": "ash", "format": "mp3"}}, "audio"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"temperature": 3}, "temperature"),
        ({"n": 17}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ],
)
def test_what_is_not_supported_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="echo", messages=HELLO, **fields)
    assert refused.value.param == param and param in refused.value.message
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"suffix": "end"}])
def test_what_completions_do_not_support_is_named(client, fields):
    with pytest.raises(openai.BadRequestError, match="not supported by this server") as refused:
        client.completions.create(model="echo", prompt="a", **fields)
    assert refused.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("model", "kind", "code"),
    [
        ("nobody", openai.NotFoundError, "model_not_found"),
        ("refuse", openai.BadRequestError, None),
        ("full", openai.RateLimitError, "rate_limit_exceeded"),
        ("fail", openai.InternalServerError, None),
        ("bug", openai.InternalServerError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_kind(client, model, kind, code, stream):
    with pytest.raises(kind) as failed:
        client.chat.completions.create(model=model, messages=HELLO, stream=stream)
    assert failed.value.code == code


def test_too_many_requests_get_a_retry_after_header(client):
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="full", messages=HELLO)
    assert refused.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("key", ["wrong", "good-ke", "good-key2", "Good-key"])
def test_a_wrong_key_is_refused(live, key):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("model", ["late", "late-bug"])
def test_a_stream_that_fails_reports_it(client, model):
    stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="failed"):
        list(stream)


@pytest.mark.parametrize("model", ["hang", "mute"])
def test_an_answer_that_takes_too_long_is_a_time_out(live, client, model):
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model=model, messages=HELLO)
    assert failed.value.status_code == 504 and "within 1 s" in failed.value.message
    eventually(lambda: live.backend.answers[-1].closed)


def test_a_stream_that_takes_too_long_ends_with_an_error(live, client):
    with pytest.raises(openai.APIError, match="within 1 s"):
        list(client.chat.completions.create(model="hang", messages=HELLO, stream=True))
    eventually(lambda: live.backend.answers[-1].closed)


def test_the_asynchronous_client_works_too(live):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="good-key", max_retries=0) as client:
            stream = await client.chat.completions.create(model="echo", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "to be or not"


def test_the_client_waits_for_its_turn():
    class Busy(FakeBackend):
        async def generate(self, request):
            self.tries = vars(self).get("tries", 0) + 1
            return await super().generate(request)

    with serving(Busy()) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=1) as client:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="full", messages=HELLO)
        assert live.backend.tries == 2
