"""Host and Origin checks, CORS, HEAD and OPTIONS."""

import http.client
import json
from urllib.parse import urlsplit

import pytest

from shadowtune.config.serving import ServerConfig
from shadowtune.errors import ConfigError
from tests.serving.http.fakes import FakeAdapters, serving

EVIL = "rebound.example"


@pytest.fixture(scope="module")
def live():
    adapters = FakeAdapters()
    with serving(config=ServerConfig(port=0, allow_loading=True), adapters=adapters) as live:
        live.adapters = adapters
        yield live


def ask(live, method, path, host, body=None, **headers):
    """Ask a real server under a name of our choice."""
    place = urlsplit(live.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    told = {"Host": host.format(port=place.port), **headers}
    if body is not None:
        told["Content-Type"] = "application/json"
    connection.request(method, path, None if body is None else json.dumps(body), told)
    response = connection.getresponse()
    response.text = response.read().decode()
    return response


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "127.9.9.9", "a.localhost"]
)
def test_this_machines_names_are_answered(live, host):
    assert ask(live, "GET", "/health", host).status == 200


@pytest.mark.parametrize(
    "host", [EVIL, EVIL + ":{port}", "127.0.0.1.example", "localhost.example:1", "10.0.0.7", "[2001:db8::1]"]
)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/metrics"])
def test_another_name_is_refused_everywhere(live, host, path):
    response = ask(live, "GET", path, host)
    assert response.status == 403 and "--allowed-host" in response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_adapter"])
def test_another_name_changes_and_asks_nothing(live, path):
    asked = len(live.backend.answers)
    body = {"model": "echo", "prompt": "x"} if "comp" in path else {"name": "x", "path": "y"}
    assert ask(live, "POST", path, EVIL, body).status == 403
    assert len(live.backend.answers) == asked and not live.adapters.loaded


@pytest.mark.parametrize("origin", [f"http://{EVIL}", f"https://{EVIL}:8000", "null", "http://[", "file://"])
def test_a_page_of_another_origin_is_refused(live, origin):
    response = ask(live, "POST", "/v1/completions", "127.0.0.1", {"model": "echo", "prompt": "x"}, Origin=origin)
    assert response.status == 403 and "--cors-origin" in response.text


def test_a_page_of_this_machine_is_answered(live):
    body = {"model": "echo", "prompt": "x"}
    assert ask(live, "POST", "/v1/completions", "localhost", body, Origin=live.url).status == 200


def test_an_allowed_name_is_answered(asking):
    client = asking(allowed_hosts=("models.example",))
    assert client.get("/health", headers={"host": "Models.Example:443"}).status_code == 200
    assert client.get("/health", headers={"host": EVIL}).status_code == 403


def test_on_other_addresses_names_are_checked_if_some_are_given(asking):
    assert asking(host="0.0.0.0").get("/health", headers={"host": EVIL}).status_code == 200
    guarded = asking(host="0.0.0.0", allowed_hosts=("models.example",))
    assert guarded.get("/health", headers={"host": EVIL}).status_code == 403


@pytest.mark.parametrize(
    "settings",
    [{"allowed_hosts": ("http://x",)}, {"allowed_origins": ("chat.example",)}, {"allowed_origins": ("https://x/y",)}],
)
def test_names_that_are_none_are_refused(settings):
    with pytest.raises(ConfigError, match="an allowed"):
        ServerConfig(**settings)


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def test_an_allowed_origin_may_send_a_key_and_read_the_decision(asking, chat):
    from shadowtune.config.serving import hash_key

    page = {"origin": "https://chat.example"}
    client = asking(allowed_origins=(page["origin"],), key_hashes=(hash_key("key"),))
    preflight = client.options("/v1/chat/completions", headers={**page, **PREFLIGHT})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == page["origin"]
    key = {"authorization": "Bearer key"}
    answer = client.post("/v1/chat/completions", json=chat(), headers={**page, **key})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page["origin"]
    assert "x-shadowtune-side" in answer.headers["access-control-expose-headers"]
    other = client.options("/v1/chat/completions", headers={"origin": f"https://{EVIL}", **PREFLIGHT})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_without_the_option_no_origin_is_allowed(asking):
    response = asking().get("/health", headers={"origin": "http://testserver"})
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers


def test_options_lists_the_methods_and_head_has_no_body(asking):
    client = asking()
    options = client.options("/v1/chat/completions")
    assert options.status_code == 204 and options.headers["allow"] == "OPTIONS, POST"
    assert "HEAD" in client.options("/health").headers["allow"]
    head, got = client.head("/v1/models"), client.get("/v1/models")
    assert head.status_code == 200 and head.text == "" and got.text
    assert head.headers["content-length"] == got.headers["content-length"]


def test_a_slash_at_the_end_is_no_redirect(live):
    response = ask(live, "POST", "/v1/completions/", "localhost", {"model": "echo", "prompt": "a b"})
    assert response.status == 200 and json.loads(response.text)["choices"][0]["text"] == "a b"
    assert ask(live, "GET", "/v1/models/", "localhost").status == 200
    assert ask(live, "GET", "/nowhere/", "localhost").status == 404
