"""Sockets, slow clients, connection limits and graceful shutdown."""

import asyncio
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.http.server import AcceptErrorHandler, ConnectionGuard, address_of, bind
from tests.serving.http.fakes import FakeBackend, eventually, serving

JSON = "Content-Type: application/json"
PROGRAM = """
import sys
from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.app import create_app
from shadowtune.serving.http.server import address_of, bind, make_server
from tests.serving.http.fakes import FakeBackend

config = ServerConfig(port=0, drain_timeout=float(sys.argv[1]))
backend = FakeBackend(pause=0.1)
with bind(config) as bound:
    app = create_app(backend, config, "cloud")
    make_server(app, config, lambda: print(address_of(bound), flush=True)).run([bound])
print("closed" if backend.closed else "open", flush=True)
"""


def connect(url):
    place = urlsplit(url)
    return socket.create_connection((place.hostname, place.port), timeout=20)


def ended(connection):
    """Whether the server closes the connection, and what it says before."""
    said = b""
    try:
        while part := connection.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    return said


def test_a_taken_port_is_one_line():
    with bind(ServerConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; choose another with --port"):
            bind(ServerConfig(port=port))


def test_an_address_of_another_machine_is_one_line():
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1 port 0"):
        bind(ServerConfig(host="203.0.113.1", port=0))


def test_an_address_is_a_url():
    with bind(ServerConfig(port=0)) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(scope="module")
def hasty():
    with serving(config=ServerConfig(port=0, read_timeout=0.3)) as live:
        yield live


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(hasty, sent):
    with connect(hasty.url) as connection:
        connection.sendall(sent)
        assert ended(connection) == b""


def test_so_does_that_of_a_second_request(hasty):
    with connect(hasty.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):  # head and body may come apart
            first += connection.recv(65536)
        assert b"200 OK" in first
        connection.sendall(b"GET /health HTTP")
        assert ended(connection) == b""


def test_a_body_that_does_not_come_is_a_time_out(hasty):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 99\r\n\r\n{"
    with connect(hasty.url) as connection:
        connection.sendall(head)
        assert b"408" in ended(connection).splitlines()[0]


def test_a_client_that_reads_nothing_is_dropped(chat):
    with serving(FakeBackend(pause=0.0), ServerConfig(port=0, read_timeout=0.3)) as live:
        body = json.dumps(chat("x" * 1000 + " " + "word " * 200_000, "slow", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(live.url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head.encode() + body)
            eventually(lambda: any(answer.closed for answer in live.backend.answers))


def test_a_body_without_end_is_cut_off():
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(config=ServerConfig(port=0, max_body_bytes=1000)) as live, connect(live.url) as connection:
        connection.sendall(head.encode() + b"64\r\n" + b"x" * 100 + b"\r\n")
        connection.sendall((b"64\r\n" + b"x" * 100 + b"\r\n") * 20)
        assert b"413" in ended(connection).splitlines()[0]
        assert not live.backend.answers


def test_what_is_not_http_is_refused(hasty):
    with connect(hasty.url) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in ended(connection).splitlines()[0]


def start(drain):
    """A server in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(drain)]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    return process, process.stdout.readline().strip()


def stream(url, text, model="slow"):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return response


def await_refusal(url):
    """Wait until the server lets nothing in."""
    deadline, status = time.monotonic() + 20, 200
    while status != 503:
        assert time.monotonic() < deadline
        place = urlsplit(url)
        late = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
        late.request("GET", "/v1/models")
        status = late.getresponse().status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_running_requests_and_refuses_new_ones(number):
    process, url = start(drain=30)
    response = stream(url, "word " * 40)
    process.send_signal(number)
    await_refusal(url)
    text = response.read().decode()
    assert text.count("word") == 40 and text.rstrip().endswith("data: [DONE]")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n"), error
    assert "Traceback" not in error


def test_after_the_drain_timeout_running_requests_get_an_error():
    process, url = start(drain=0.2)
    response = stream(url, "a b", model="hang")
    process.send_signal(signal.SIGTERM)
    assert "the server is shutting down" in response.read().decode().splitlines()[-2]
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n"), error


def test_a_second_signal_does_not_wait():
    process, url = start(drain=600)
    response = stream(url, "a b", model="hang")
    process.send_signal(signal.SIGTERM)
    await_refusal(url)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    response.close()


class Connection:
    """A connection of uvicorn: without a request, answering, or with a part of a response unread."""

    def __init__(self, answering=False):
        self.transport, self.timeout_keep_alive_task = self, None
        self.cycle = SimpleNamespace(response_complete=not answering)
        self.dropped, self.unread = False, 0

    def abort(self):
        self.dropped = True

    def is_closing(self):
        return self.dropped

    def get_write_buffer_size(self):
        return self.unread


def test_beyond_the_limit_the_connection_that_was_idle_the_longest_is_dropped():
    guard, connections = ConnectionGuard(3, 60.0), []
    first, second, third, fourth, fifth = (Connection() for _ in range(5))
    for each in (first, second, third):
        connections.append(each)
        guard.limit(connections)
    first.cycle.response_complete = False
    connections.append(fourth)
    guard.limit(connections)
    assert second.dropped and not first.dropped
    assert sum(not each.dropped for each in connections) == 3
    first.cycle.response_complete = True  # the youngest of those that are idle
    guard.limit(connections)
    connections.append(fifth)
    guard.limit(connections)
    assert third.dropped and not first.dropped and not fourth.dropped


def test_where_all_are_answered_the_new_connection_is_dropped():
    guard = ConnectionGuard(2, 60.0)
    first, second = Connection(answering=True), Connection(answering=True)
    for third in (Connection(), Connection(answering=True)):
        guard.limit([first, second, third])
        assert [each.dropped for each in (first, second, third)] == [False, False, True]


def test_only_a_client_that_owes_something_for_too_long_is_dropped():
    now = [0.0]
    guard = ConnectionGuard(9, 30.0, lambda: now[0])
    silent, slow, reader, answered, kept = (Connection() for _ in range(5))
    answered.cycle.response_complete = False
    slow.unread = reader.unread = 1000
    kept.timeout_keep_alive_task = "uvicorn's own timer"
    for step in range(31):
        now[0] = float(step)
        reader.unread -= 10
        guard.check([silent, slow, reader, answered, kept])
        assert not any(each.dropped for each in (reader, answered, kept))
        assert silent.dropped == slow.dropped == (step >= 30)


def test_half_open_connections_leave_room_for_a_request():
    with serving(config=ServerConfig(port=0, max_connections=4)) as live:
        idle = [connect(live.url) for _ in range(12)]
        for connection in idle:
            connection.sendall(b"GET /heal")
        place = urlsplit(live.url)
        client = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
        client.request("GET", "/health")
        assert client.getresponse().status == 200
        for connection in idle:
            connection.close()


def test_accept_errors_are_logged_once_a_minute(caplog):
    now = [0.0]
    handle = AcceptErrorHandler(lambda: now[0])
    loop = asyncio.new_event_loop()
    with caplog.at_level("ERROR"):
        for _ in range(10_000):
            handle(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
        assert len(caplog.records) == 1
        now[0] += 61
        handle(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
        assert "9999 times more" in caplog.records[1].getMessage() and len(caplog.records) == 2
        handle(loop, {"message": "another", "exception": ValueError("x")})
        assert len(caplog.records) == 3
    loop.close()
