import json

import pytest

from shadowtune.serving.requests import RoutingDecision
from tests.serving.http.fakes import FakeBackend

EDGE = RoutingDecision("edge", "confident\r\nx: Zürich", 0.875, 0.5)


def events(response):
    """The data of every event; each is one line and an empty one."""
    parts = response.text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def test_a_stream_is_server_sent_events_to_the_letter(asking, chat):
    response = asking().post("/v1/chat/completions", json=chat("ä b", stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache" and "content-length" not in response.headers
    *data, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(text) for text in data]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None
    }  # fmt: skip
    assert [choice["delta"] for choice in choices[1:]] == [{"content": "ä"}, {"content": " b"}, {}]
    assert choices[-1]["finish_reason"] == "stop"
    heads = {(chunk["id"], chunk["object"], chunk["model"], chunk["created"]) for chunk in chunks}
    assert len(heads) == 1 and not any("usage" in chunk for chunk in chunks)


def test_usage_is_null_until_the_last_chunk(asking, chat):
    options = {"include_usage": True}
    response = asking().post("/v1/chat/completions", json=chat(stream=True, stream_options=options))
    *chunks, last = [json.loads(text) for text in events(response)[:-1]]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4 and "shadowtune" in last


def test_headers_and_body_have_the_routing_decision(asking, chat):
    client = asking(FakeBackend(decision=EDGE))
    response = client.post("/v1/chat/completions", json=chat())
    assert response.headers["x-shadowtune-side"] == "edge"
    assert response.headers["x-shadowtune-reason"] == "confident??x: Z?rich"  # nothing of it can be a header of its own
    assert "x" not in response.headers
    assert response.headers["x-shadowtune-confidence"] == "0.875" and response.headers["x-shadowtune-cost"] == "0.5"
    assert response.json()["shadowtune"] == vars(EDGE)


def test_a_stream_has_it_in_its_headers_and_last_chunk(asking, chat):
    response = asking().post("/v1/chat/completions", json=chat(stream=True))
    assert response.headers["x-shadowtune-side"] == "cloud" and "x-shadowtune-confidence" not in response.headers
    chunks = [json.loads(text) for text in events(response)[:-1]]
    assert ["shadowtune" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["shadowtune"] == {"side": "cloud", "reason": "attached", "confidence": None, "cost": 1.5}


def test_several_choices_cost_what_they_cost_together(asking, chat):
    response = asking().post("/v1/chat/completions", json=chat(n=3))
    assert response.json()["shadowtune"]["cost"] == 4.5


def test_an_error_before_the_first_piece_is_a_status(asking, chat):
    response = asking().post("/v1/chat/completions", json=chat(model="fail", stream=True))
    assert response.status_code == 500 and response.json()["error"]["message"] == "the pass failed"


@pytest.mark.parametrize("model", ["late", "late-bug"])
def test_an_error_after_it_is_the_last_event(asking, chat, model):
    client = asking()
    response = client.post("/v1/chat/completions", json=chat(model=model, stream=True))
    assert response.status_code == 200
    *_, last = events(response)
    assert json.loads(last)["error"]["type"] == "server_error" and "nobody may see" not in last
    assert client.backend.answers[-1].closed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["echo", "fail", "late", "bug"])
def test_every_generation_is_closed_and_its_capacity_freed(asking, chat, model, stream):
    client = asking(max_requests=2)
    for _ in range(3):
        client.post("/v1/chat/completions", json=chat(model=model, stream=stream, n=2))
    assert len(client.backend.answers) == 6 and all(answer.closed for answer in client.backend.answers)


def test_if_one_choice_is_refused_the_others_are_closed(asking):
    class Half(FakeBackend):
        async def generate(self, request):
            if self.answers:
                request = type(request)(**{**vars(request), "model": "full"})
            return await super().generate(request)

    client = asking(Half())
    body = {"model": "echo", "prompt": ["a", "b"]}
    assert client.post("/v1/completions", json=body).status_code == 429
    assert [answer.closed for answer in client.backend.answers] == [True]
