import asyncio
import gzip
import json

import pytest

from shadowtune.config.serving import CloudConfig
from shadowtune.errors import ConfigError
from shadowtune.export.runtimes import GgufModel
from shadowtune.serving.edge.openai_api import RemoteError
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.requests import GenerationRequest, SamplingParams, Usage
from tests.serving.edge.models import write
from tests.serving.edge.sockets import (
    STREAM_HEAD,
    answer,
    cloud_that,
    drips,
    event,
    hangs,
    refusal,
    then_hangs,
    words,
)
from tests.support.tokenizers import tiny_tokenizer

REQUEST = GenerationRequest("m", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
COMPRESSED = STREAM_HEAD[:-2] + b"content-encoding: gzip\r\n\r\n" + gzip.compress(words("a"))
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"


class Slept(list):
    """Sleeps no time at all, and remembers for how long it should have."""

    async def __call__(self, seconds):
        self.append(seconds)


def asked(*script, request=REQUEST, times=1, **settings):
    """Ask a scripted cloud; return for each time the pieces or the error, and what was seen."""
    slept = Slept()

    async def run():
        async with cloud_that(*script) as fake:
            quick = {"model": "big", "read_timeout": 0.3, "deadline": 2.0, "retries": 0, **settings}
            cloud = RemoteEndpoint(CloudConfig(fake.url, **quick), sleep=slept)
            outcomes = []
            for _ in range(times):
                pieces = []
                try:
                    async for piece in await cloud.generate(request):
                        pieces.append(piece)
                    outcomes.append(pieces)
                except RemoteError as error:
                    outcomes.append((pieces, error))
            await cloud.aclose()
            return outcomes, fake, cloud

    outcomes, fake, cloud = asyncio.run(run())
    fake.slept, fake.cloud = slept, cloud
    return outcomes if times > 1 else outcomes[0], fake


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_an_answer_comes_piece_by_piece_with_its_usage():
    pieces, fake = asked(answer("a", "b", reason="length"))
    assert [piece.text for piece in pieces] == ["a", "b", ""]
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage == Usage(5, 2)
    assert fake.paths == ["/v1/chat/completions"]
    assert fake.bodies[0] == {
        "model": "big",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "authorization" not in fake.heads[0].lower()


def test_a_key_and_everything_that_a_request_says_are_sent():
    request = GenerationRequest(
        "m",
        prompt="café \ud800",
        sampling=SamplingParams(temperature=0.5, top_k=3, seed=1, logit_bias={4: -1.0}),
        stop=("x",),
        ignore_eos=True,
        speculate=False,
        top_logprobs=2,
        prediction="so",
    )
    logprobs = {"tokens": ["o"], "token_logprobs": [-0.5], "top_logprobs": [{"o": -0.5, "p": -1.0}]}
    sent = {"choices": [{"index": 0, "text": "o", "finish_reason": "stop", "logprobs": logprobs}]}
    (piece,), fake = asked(STREAM_HEAD + event(sent), request=request, key="secret")
    assert "authorization: bearer secret" in fake.heads[0].lower()
    assert fake.paths == ["/v1/completions"]
    body = fake.bodies[0]
    assert body["prompt"] == "café \ud800"
    assert (body["temperature"], body["top_k"], body["seed"], body["logit_bias"]) == (0.5, 3, 1, {"4": -1.0})
    assert (body["stop"], body["ignore_eos"], body["speculate"], body["logprobs"]) == (["x"], True, False, 2)
    assert body["prediction"] == {"type": "content", "content": "so"}
    assert "top_p" not in body
    (token,) = piece.tokens
    assert (token.text, token.logprob, token.top) == ("o", -0.5, ((-1, "o", -0.5), (-1, "p", -1.0)))


@pytest.mark.parametrize(
    ("script", "reason", "status"),
    [
        (hangs, "cloud timed out", 504),
        (drips(b": wait\n\n"), "cloud timed out", 504),
        (drips(b"x" * 1000, head=b"", pause=0), "cloud broke off", 502),
        (drips(b"x" * 100, pause=0), "cloud sent garbage", 502),
        (then_hangs(STREAM_HEAD), "cloud timed out", 504),
        (then_hangs(b"HTTP/1.1 200 OK\r\nx-slow"), "cloud timed out", 504),
        (b"", "cloud broke off", 502),
        (b"\x00\xff garbage \r\n\r\n", "cloud broke off", 502),
        (STREAM_HEAD, "cloud broke off", 502),
        (STREAM_HEAD + event(b"{"), "cloud sent garbage", 502),
        (STREAM_HEAD + event(b"[" * 100_000), "cloud sent garbage", 502),
        (STREAM_HEAD + event([1]), "cloud sent garbage", 502),
        (STREAM_HEAD + event({"choices": 5}), "cloud sent garbage", 502),
        (STREAM_HEAD + event({"choices": [{"delta": {"content": 7}}]}), "cloud sent garbage", 502),
        (STREAM_HEAD + event({"error": {"message": "out of memory"}}), "cloud failed", 502),
        (STREAM_HEAD + event({"error": {"message": "too many", "code": 400}}), "cloud answered 400", 502),
        (STREAM_HEAD + event({"error": {"message": "odd", "code": True}}), "cloud failed", 502),
        (STREAM_HEAD + b"data: " + b"x" * 5000, "cloud sent garbage", 502),
        (STREAM_HEAD + b"<html>\n", "cloud sent garbage", 502),
        (STREAM_HEAD + (b"data: " + b"x" * 500 + b"\n") * 10, "cloud sent garbage", 502),
        (COMPRESSED, "cloud sent garbage", 502),
        (STREAM_HEAD + event(b"[DONE]"), "cloud broke off", 502),
        (JSON_HEAD + b'{"choices": []}', "cloud sent garbage", 502),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html>", "cloud sent garbage", 502),
        (b"HTTP/1.1 302 X\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n", "cloud answered 302", 502),
        (refusal(500), "cloud answered 500", 502),
        (refusal(401, "bad key"), "cloud answered 401", 502),
        (refusal(429), "cloud busy", 502),
    ],
)
def test_whatever_a_cloud_does_is_one_clear_error(script, reason, status):
    (pieces, error), _ = asked(script, max_line_bytes=2000, deadline=0.6)
    assert pieces == []
    assert (error.reason, error.status) == (reason, status)
    assert "\n" not in str(error)


def test_a_refusal_in_the_stream_is_neither_repeated_nor_a_failure_of_the_endpoint():
    script = STREAM_HEAD + event({"error": {"message": "logprobs of 3, max 2", "code": 400}})
    (_, error), fake = asked(script, retries=2, failures=1)
    assert (error.http_status, "max 2" in str(error)) == (400, True)
    assert len(fake.bodies) == 1


def test_a_stream_is_utf_8_whatever_its_header_says():
    pieces, _ = asked(STREAM_HEAD.replace(b"event-stream", b"event-stream; charset=utf-16") + words("é"))
    assert text(pieces) == "é"


def test_nobody_there_is_unreachable():
    async def run():
        async with cloud_that(b"") as fake:
            url = fake.url
        await asyncio.sleep(0)
        cloud = RemoteEndpoint(CloudConfig(url, model="big", retries=0))
        with pytest.raises(RemoteError) as caught:
            await cloud.generate(REQUEST)
        await cloud.aclose()
        return caught.value

    assert asyncio.run(run()).reason == "cloud unreachable"


def test_the_detail_of_a_refusal_is_told_on_one_line():
    (_, error), _ = asked(refusal(400, "first\nsecond " + "x" * 1000))
    assert "first second" in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("fault", [b"", refusal(503), refusal(429), STREAM_HEAD, STREAM_HEAD + words(reason=None)])
def test_while_nothing_has_come_it_is_asked_again(fault):
    pieces, fake = asked(fault, fault, answer("a"), retries=2)
    assert text(pieces) == "a"
    assert len(fake.bodies) == 3
    first, second = fake.slept
    assert 0.125 <= first <= 0.375
    assert 0.25 <= second <= 0.75


def test_the_attempts_come_to_an_end():
    (_, error), fake = asked(refusal(500), retries=2)
    assert error.reason == "cloud answered 500"
    assert len(fake.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_would_be_refused_again_is_not_asked_again(status):
    _, fake = asked(refusal(status), retries=2)
    assert len(fake.bodies) == 1
    assert fake.cloud.breaker.state == "closed"


@pytest.mark.parametrize(
    "rest", [b"", event(b"{"), event({"error": {"message": "x"}})], ids=["cut off", "garbage", "error"]
)
def test_once_something_came_it_is_never_asked_again(rest):
    (pieces, error), fake = asked(STREAM_HEAD + words("a", reason=None) + rest, retries=2)
    assert text(pieces) == "a"
    assert error.status == 502
    assert len(fake.bodies) == 1


def test_a_stream_that_stops_in_the_middle_times_out():
    (pieces, error), fake = asked(then_hangs(STREAM_HEAD + words("a", reason=None)), retries=2)
    assert (text(pieces), error.reason) == ("a", "cloud timed out")
    assert len(fake.bodies) == 1


def test_an_endless_answer_is_ended_by_its_length():
    endless = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    (pieces, error), _ = asked(drips(endless, pause=0), max_body_bytes=5000)
    assert error.reason == "cloud sent garbage"
    assert 0 < len(text(pieces)) < 200


def test_an_answer_that_goes_on_is_not_cut_at_the_deadline():
    now = [0.0]

    async def slowly(reader, writer):
        now[0] = 1000.0
        writer.write(answer("a", "b"))
        await writer.drain()

    async def run():
        async with cloud_that(slowly) as fake:
            cloud = RemoteEndpoint(CloudConfig(fake.url, model="big", retries=0, deadline=60), clock=lambda: now[0])
            pieces = [piece async for piece in await cloud.generate(REQUEST)]
            await cloud.aclose()
            return pieces

    assert text(asyncio.run(run())) == "ab"


def test_a_first_token_and_the_next_have_times_of_their_own():
    (pieces, error), _ = asked(drips(b": wait\n\n"), first_token_timeout=0.3, deadline=600.0)
    assert (pieces, error.reason) == ([], "cloud timed out")
    goes_silent = STREAM_HEAD + words("a", reason=None)
    (pieces, error), _ = asked(drips(b": wait\n\n", head=goes_silent), idle_timeout=0.3, deadline=600.0)
    assert (text(pieces), error.reason) == ("a", "cloud timed out")


def chunk(**fields):
    return {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}], **fields}


ODD = {
    "infinity": b'{"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", '
    b'"logprob": Infinity}]}, "finish_reason": "stop"}]}',
    "no number": b'{"choices": [], "usage": {"prompt_tokens": NaN, "completion_tokens": 1}}',
    "half a character": b'{"choices": [{"index": 0, "delta": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
    "half a character in a call": b'{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "x", '
    b'"function": {"name": "f", "arguments": "\\ud800"}}]}, "finish_reason": "tool_calls"}]}',
    "negative count": json.dumps(chunk(usage={"prompt_tokens": -5, "completion_tokens": 1})).encode(),
    "4,000 digits": b'{"choices": [], "usage": {"prompt_tokens": ' + b"9" * 4000 + b"}}",
    "a huge logarithm": b'{"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", '
    b'"logprob": ' + b"9" * 4000 + b'}]}, "finish_reason": "stop"}]}',
    "true as a count": json.dumps(chunk(usage={"prompt_tokens": True, "completion_tokens": 1})).encode(),
    "a list as a reason": json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": ["stop"]}]}).encode(),
    "text as tool calls": json.dumps({"choices": [{"delta": {"tool_calls": "x"}, "finish_reason": "stop"}]}).encode(),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_reply_is_garbage_and_the_probe_is_released(odd):
    """The circuit opens at the first failure, the second attempt is the probe, and the third must be let through."""
    now = [0.0]
    request = GenerationRequest("m", messages=[{"role": "user", "content": "hi"}], top_logprobs=0)

    async def run():
        async with cloud_that(b"", STREAM_HEAD + event(odd), answer("a")) as fake:
            config = CloudConfig(fake.url, model="big", retries=0, failures=1, cool_down=10)
            cloud = RemoteEndpoint(config, clock=lambda: now[0])
            outcomes = []
            for _ in range(3):
                try:
                    outcomes.append(text([piece async for piece in await cloud.generate(request)]))
                except RemoteError as error:
                    outcomes.append(error.reason)
                now[0] += 20
            await cloud.aclose()
            return outcomes

    assert asyncio.run(run()) == ["cloud broke off", "cloud sent garbage", "a"]


def test_whatever_an_attempt_raises_the_probe_is_released(monkeypatch):
    now = [0.0]

    async def breaks(self, request):
        raise MemoryError

    async def run():
        async with cloud_that(b"", answer("a")) as fake:
            config = CloudConfig(fake.url, model="big", retries=0, failures=1, cool_down=10)
            cloud = RemoteEndpoint(config, clock=lambda: now[0])
            with pytest.raises(RemoteError):
                await cloud.generate(REQUEST)
            now[0] = 20
            with monkeypatch.context() as patched:
                patched.setattr(RemoteEndpoint, "_begin", breaks)
                with pytest.raises(MemoryError):
                    await cloud.generate(REQUEST)
            pieces = [piece async for piece in await cloud.generate(REQUEST)]
            await cloud.aclose()
            return text(pieces)

    assert asyncio.run(run()) == "a"


def test_fields_go_on_as_they_came():
    messages = [{"role": "developer", "content": "be short"}, {"role": "user", "content": "hi"}]
    request = GenerationRequest("m", messages=messages, max_tokens=7, forwarded={"max_completion_tokens": 7})
    _, fake = asked(answer("a"), request=request)
    assert fake.bodies[0]["messages"] == messages
    assert fake.bodies[0]["max_completion_tokens"] == 7 and "max_tokens" not in fake.bodies[0]


def test_tool_calls_of_a_cloud_come_as_they_are():
    parts = [
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    chunks = [{"choices": [{"index": 0, "delta": part, "finish_reason": None}]} for part in parts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    pieces, _ = asked(STREAM_HEAD + b"".join(map(event, chunks)))
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert [(call.id, call.name, call.arguments) for call in calls] == [
        ("call_1", "f", ""),
        (None, None, '{"a"'),
        (None, None, ": 1}"),
    ]
    assert pieces[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(("header", "wait"), [("0", 0.0), ("1", 1.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)])
def test_retry_after_is_kept_to(header, wait):
    pieces, fake = asked(refusal(429, head=f"retry-after: {header}\r\n"), answer("a"), retries=1)
    assert text(pieces) == "a"
    assert fake.slept == [wait]


def test_a_wait_beyond_the_deadline_is_not_waited_for():
    (_, error), fake = asked(refusal(429, head="retry-after: 60\r\n"), answer("a"), retries=1)
    assert error.reason == "cloud busy"
    assert fake.slept == []


def test_a_retry_after_of_nonsense_is_none():
    _, fake = asked(refusal(503, head="retry-after: soon\r\n"), answer("a"), retries=1)
    assert 0.125 <= fake.slept[0] <= 0.375


def test_a_cloud_that_fails_is_left_alone_and_tried_again_later():
    now = [0.0]

    async def run():
        async with cloud_that(refusal(500), refusal(500), refusal(500), answer("a")) as fake:
            cloud = RemoteEndpoint(
                CloudConfig(fake.url, model="big", retries=0, failures=2, cool_down=10, deadline=5),
                clock=lambda: now[0],
            )

            async def reason():
                try:
                    await (await cloud.generate(REQUEST)).aclose()
                    return "answered"
                except RemoteError as error:
                    return error.reason

            seen = [await reason() for _ in range(3)]
            now[0] = 11
            seen += [await reason(), await reason()]
            now[0] = 22
            seen += [await reason(), await reason()]
            await cloud.aclose()
            return seen, len(fake.bodies)

    seen, requests = asyncio.run(run())
    failed, alone = "cloud answered 500", "cloud circuit open"
    assert seen == [failed, failed, alone, failed, alone, "answered", "answered"]
    assert requests == 5


def test_a_stream_that_breaks_counts_as_a_failure():
    outcomes, fake = asked(STREAM_HEAD + words("a", reason=None), times=3, failures=1)
    assert [error.reason for _, error in outcomes] == ["cloud broke off", "cloud circuit open", "cloud circuit open"]
    assert len(fake.bodies) == 1


def test_closing_an_answer_closes_the_connection():
    async def run():
        async with cloud_that(drips(words("a", reason=None))) as fake:
            cloud = RemoteEndpoint(CloudConfig(fake.url, model="big"))
            answered = await cloud.generate(REQUEST)
            await anext(aiter(answered))
            await answered.aclose()
            await asyncio.wait_for(fake.gone.wait(), 5)
            assert [piece async for piece in answered if piece.finish_reason] == []
            await cloud.aclose()

    asyncio.run(run())


def test_giving_up_while_waiting_closes_the_connection_and_is_no_failure():
    async def run():
        async with cloud_that(hangs) as fake:
            cloud = RemoteEndpoint(CloudConfig(fake.url, model="big", failures=1))
            task = asyncio.ensure_future(cloud.generate(REQUEST))
            while not fake.bodies:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(fake.gone.wait(), 5)
            assert cloud.breaker.state == "closed"
            await cloud.aclose()

    asyncio.run(run())


def test_a_cloud_without_predictions_is_asked_without_and_never_again_with():
    request = GenerationRequest("m", messages=REQUEST.messages, prediction="so")
    outcomes, fake = asked(
        refusal(400, "unknown field 'prediction'"), answer("a"), answer("b"), request=request, times=2, failures=1
    )
    assert [text(pieces) for pieces in outcomes] == ["a", "b"]
    assert ["prediction" in body for body in fake.bodies] == [True, False, False]


@pytest.mark.parametrize(("wanted", "sent"), [("second", "second"), ("other", "first")])
def test_without_a_name_the_cloud_is_asked_for_what_it_lists(wanted, sent):
    listed = json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode()
    request = GenerationRequest(wanted, messages=REQUEST.messages)
    outcomes, fake = asked(JSON_HEAD + listed, answer("a"), answer("b"), request=request, times=2, model=None)
    assert [text(pieces) for pieces in outcomes] == ["a", "b"]
    assert fake.paths == ["/v1/models", *["/v1/chat/completions"] * 2]
    assert {body["model"] for body in fake.bodies[1:]} == {sent}


@pytest.mark.parametrize("listed", [b"{", b'{"data": []}', b"[]", b"[" * 100_000])
def test_a_list_of_models_that_is_none_is_garbage(listed):
    (_, error), _ = asked(JSON_HEAD + listed, model=None)
    assert error.reason == "cloud sent garbage"


@pytest.mark.parametrize("url", ["cloud:8000", "ftp://cloud", "http://", "", "http://[::1", "http://h:99999"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="address"):
        RemoteEndpoint(CloudConfig(url))


@pytest.mark.parametrize("fields", [{"prompt": "the sea"}, {"messages": REQUEST.messages}], ids=["completions", "chat"])
def test_a_stock_llama_cpp_server_is_a_cloud(fields, tmp_path):
    pytest.importorskip("xllamacpp")
    server = GgufModel(write("gguf", tmp_path), 128, 1)
    request = GenerationRequest(
        "x", **fields, max_tokens=6, sampling=SamplingParams(temperature=0), prediction="so", top_logprobs=0
    )

    async def run():
        cloud = RemoteEndpoint(CloudConfig(server.server.listening_address))
        pieces = [piece async for piece in await cloud.generate(request)]
        await cloud.aclose()
        return pieces

    pieces = asyncio.run(run())
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 6
    if "prompt" in fields:  # the tiny model answers a chat with special tokens, which have no text
        tokenizer = tiny_tokenizer()
        ids = server.generate(tokenizer("the sea")["input_ids"], 6)
        assert text(pieces) == tokenizer.decode(ids, skip_special_tokens=True) != ""
        assert all(token.logprob < 0 for piece in pieces for token in piece.tokens)


def test_the_key_is_not_shown():
    assert "secret" not in repr(CloudConfig("http://cloud", key="secret"))
