"""Clients that disconnect, over a real connection."""

import http.client
import json
from urllib.parse import urlsplit

import pytest

from shadowtune.config.serving import ServerConfig
from tests.serving.http.fakes import FakeBackend, eventually, serving


@pytest.fixture(scope="module")
def live():
    with serving(FakeBackend(pause=0.02), ServerConfig(port=0, max_requests=2)) as live:
        yield live


def begin(live, body):
    """Send a request and return its connection."""
    place = urlsplit(live.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("model", ["hang", "slow"])
def test_a_disconnect_during_a_stream_closes_the_generation(live, chat, model):
    connection = begin(live, chat("one two " * 2000, model, stream=True))
    assert connection.getresponse().readline().startswith(b"data: ")
    answer = live.backend.answers[-1]
    assert not answer.closed
    connection.close()
    eventually(lambda: answer.closed)
    eventually(lambda: live.server._admission.in_progress == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_chunk_closes_the_generation(live, chat, stream):
    before = len(live.backend.answers)
    connection = begin(live, chat(model="mute", stream=stream, n=2))
    eventually(lambda: len(live.backend.answers) == before + 2)
    connection.close()
    eventually(lambda: all(answer.closed for answer in live.backend.answers[before:]))


def test_a_disconnect_during_routing_frees_the_capacity(chat):
    import asyncio

    class Undecided(FakeBackend):
        async def generate(self, request):
            self.asked_by = True
            try:
                await asyncio.sleep(3600)
            finally:
                self.told = True

    backend = Undecided()
    with serving(backend) as live:
        connection = begin(live, chat())
        eventually(lambda: "asked_by" in vars(backend))
        connection.close()
        eventually(lambda: "told" in vars(backend) and live.server._admission.in_progress == 0)


def test_requests_beyond_the_capacity_are_refused_and_no_others(live, chat):
    first = begin(live, chat(model="hang", stream=True, n=2))
    assert first.getresponse().readline()
    second = begin(live, chat()).getresponse()
    assert second.status == 429 and second.headers["retry-after"] == "1"
    assert "2 answers are under way" in json.loads(second.read())["error"]["message"]
    first.close()
    eventually(lambda: live.server._admission.in_progress == 0)
    third = begin(live, chat(n=2)).getresponse()
    assert third.status == 200


def test_a_request_beyond_the_limit_by_itself_is_invalid(live, chat):
    response = begin(live, chat(n=3)).getresponse()
    assert response.status == 400 and b"ask for fewer" in response.read()


def test_many_clients_at_once_get_their_own(chat):
    from concurrent.futures import ThreadPoolExecutor

    def ask(number):
        body = chat(f"word{number} " * 5, "slow", stream=number % 2 == 0)
        text = begin(live, body).getresponse().read().decode()
        return text.count(f"word{number}"), text

    with serving(FakeBackend(pause=0.01)) as live, ThreadPoolExecutor(16) as pool:
        for count, text in pool.map(ask, range(40)):
            assert count == 5, text
