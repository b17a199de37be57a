"""Admin keys: loading adapters and changing the policy."""

import logging

import pytest

from shadowtune.config.serving import hash_key
from tests.serving.http.fakes import FakeAdapters, FakePolicy

KEYS = {"key_hashes": (hash_key("user"),), "admin_hashes": (hash_key("admin"),)}
BODY = {"name": "new", "path": "run"}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def guarded(asking, tmp_path):
    (tmp_path / "adapters" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "elsewhere")
    adapters = FakeAdapters()
    root = str(tmp_path / "adapters")
    client = asking(controls={"adapters": adapters}, allow_loading=True, adapter_root=root, **KEYS)
    client.adapters, client.root = adapters, tmp_path / "adapters"
    return client


def test_an_admin_key_loads_and_opens_the_rest(guarded, chat):
    assert guarded.post("/v1/load_adapter", json=BODY, headers=bearer("admin")).status_code == 200
    assert guarded.adapters.loaded == {"new": str(guarded.root / "run")}
    assert guarded.post("/v1/chat/completions", json=chat(), headers=bearer("admin")).status_code == 200
    assert guarded.post("/v1/unload_adapter", json={"name": "new"}, headers=bearer("admin")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/load_adapter", "/v1/unload_adapter", "/v1/load_adapter/"])
def test_another_key_does_not(guarded, path):
    assert guarded.post(path, json=BODY, headers=bearer("user")).status_code == 403
    assert guarded.post(path, json=BODY, headers=bearer("nobody")).status_code == 401
    assert guarded.post(path, json=BODY).status_code == 401
    assert not guarded.adapters.loaded


def test_without_an_admin_key_no_key_does(asking):
    adapters = FakeAdapters()
    client = asking(controls={"adapters": adapters}, allow_loading=True, key_hashes=KEYS["key_hashes"])
    assert client.post("/v1/load_adapter", json=BODY, headers=bearer("user")).status_code == 403
    assert not adapters.loaded


def test_a_server_without_other_keys_asks_for_the_admin_key_alone(asking, chat):
    client = asking(controls={"policy": FakePolicy()}, role="edge", admin_hashes=KEYS["admin_hashes"])
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    assert client.put("/v1/policy", json={"threshold": 0.1}).status_code == 401
    assert client.put("/v1/policy", json={"threshold": 0.1}, headers=bearer("admin")).status_code == 200


@pytest.mark.parametrize(
    "path", ["../elsewhere", "/etc", "/nowhere", "link", "absent", ".", "run/../..", "x" * 4000, "a\0b"]
)
def test_what_is_not_in_the_directory_is_refused_whether_it_exists_or_not(guarded, path):
    refused = guarded.post("/v1/load_adapter", json={"name": "new", "path": path}, headers=bearer("admin"))
    assert refused.status_code == 400 and not guarded.adapters.loaded
    assert refused.json()["error"]["message"] == "path must name an adapter in the server's adapter directory"


@pytest.mark.parametrize("name", ["a\nb", "a b", "", "../x", "é", "-x", "x" * 65, "a/b", "x\n"])
def test_names_are_plain(guarded, name):
    refused = guarded.post("/v1/load_adapter", json={"name": name, "path": "run"}, headers=bearer("admin"))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "name"


def test_what_was_there_at_the_start_stays(guarded):
    refused = guarded.post("/v1/unload_adapter", json={"name": "echo"}, headers=bearer("admin"))
    assert refused.status_code == 403


def test_refusals_are_logged_on_one_line_each(asking, chat, caplog):
    client = asking()
    with caplog.at_level(logging.INFO, "shadowtune.serving"):
        client.post("/v1/chat/completions", json=chat(model="full"))
        client.post("/v1/chat/completions", json={"secret": "words"})
        client.get("/v1/models/a%0Aforged%20line")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
    assert [line.rpartition("status ")[2] for line in lines] == ["429", "400", "404"]
    assert all("\n" not in line and "words" not in line for line in lines)
    assert lines[2].split()[2] == "/v1/models/a?forged?line"
