import json

import pytest

from shadowtune.config.serving import hash_key
from shadowtune.serving.http.middleware import is_authorized

KEYS = (hash_key("first"), hash_key("second"))
JSON = {"content-type": "application/json"}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("Bearer first", True),
        ("bearer second", True),
        ("Bearer third", False),
        ("Bearer firs", False),
        ("Bearer first2", False),
        ("Bearer ", False),
        ("", False),
        ("first", False),
        ("Basic first", False),
        (f"Bearer {KEYS[0]}", False),
    ],
)
def test_a_key_is_known_whole_or_not(header, known):
    assert is_authorized(header, KEYS) is known


def test_without_keys_everyone_may():
    assert is_authorized("", ()) is True


def test_every_key_is_compared(monkeypatch):
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda sent, one: compared.append(one) or sent == one)
    assert is_authorized("Bearer first", KEYS) and not is_authorized("Bearer none", KEYS)
    assert compared == [*KEYS, *KEYS]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/echo", "/v1/recent", "/v1/policy", "/metrics", "/openapi.json"]
)
def test_only_health_and_the_page_are_open(asking, path):
    client = asking(key_hashes=KEYS)
    refused = client.get(path)
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert client.get(path, headers=bearer("second")).status_code in (200, 404)
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_without_a_key_nothing_is_read_or_asked(asking, chat):
    client = asking(key_hashes=KEYS)
    for key in ("wrong", "f", "FIRST"):
        assert client.post("/v1/chat/completions", json=chat(), headers=bearer(key)).status_code == 401
    assert client.post("/v1/chat/completions", json=chat()).status_code == 401
    assert not client.backend.answers


def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(asking, chat):
    body = json.dumps(chat()).encode()
    exact, short = asking(max_body_bytes=len(body)), asking(max_body_bytes=len(body) - 1)
    assert exact.post("/v1/chat/completions", content=body, headers=JSON).status_code == 200
    refused = short.post("/v1/chat/completions", content=body, headers=JSON)
    assert refused.status_code == 413 and refused.headers["connection"] == "close"
    assert "at most" in refused.json()["error"]["message"]


def test_a_body_of_unsaid_length_is_counted_while_it_comes(asking):
    client = asking(max_body_bytes=1000)
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield b"x" * 100

    import itertools

    body = itertools.islice(endless(), 50)
    refused = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert refused.status_code == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_kind_of_body_is_refused(asking, chat, kind):
    client = asking()
    refused = client.post("/v1/chat/completions", content=json.dumps(chat()), headers={"content-type": kind})
    assert refused.status_code == 415 and "Content-Type: application/json" in refused.json()["error"]["message"]


def test_json_with_a_charset_is_json(asking, chat):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert asking().post("/v1/chat/completions", content=json.dumps(chat()), headers=headers).status_code == 200


def test_a_draining_server_refuses_requests(asking, chat):
    client = asking()
    client.admission.draining = True
    refused = client.post("/v1/chat/completions", json=chat())
    assert refused.status_code == 503 and refused.headers["connection"] == "close" and refused.headers["retry-after"]
