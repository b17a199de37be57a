import pytest

from tests.serving.http.fakes import FakeAdapters, FakePolicy


@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_health_reports_the_role(asking, role):
    assert asking(role=role).get("/health").json() == {"status": "ok", "role": role}


def test_models_are_cards(asking):
    models = asking().get("/v1/models").json()
    assert models["object"] == "list"
    assert models["data"][0] == {
        "id": "echo",
        "object": "model",
        "created": 1700000000,
        "owned_by": "shadowtune",
        "root": "tiny",
        "max_model_len": 64,
    }
    assert asking().get("/v1/models/echo").json() == models["data"][0]
    assert asking().get("/v1/models/of/nobody").status_code == 404


def test_recent_requests_are_listed_without_their_words(asking, chat):
    client = asking()
    client.post("/v1/chat/completions", json=chat("hush hush"))
    client.post("/v1/chat/completions", json=chat("hush", model="nobody"))
    client.post("/v1/completions", json={"model": "slow", "prompt": "hush now dear"})
    response = client.get("/v1/recent")
    first, second = response.json()["requests"]  # a request that was refused is none
    assert (first["model"], first["side"], first["reason"], first["confidence"]) == ("echo", "cloud", "attached", None)
    assert (second["model"], second["prompt_tokens"], second["completion_tokens"]) == ("slow", 3, 3)
    assert first["cost"] == 1.5 and first["time"] <= second["time"]
    assert 0 < second["first_token_seconds"] <= second["seconds"]
    assert second["seconds"] - second["first_token_seconds"] > 0.1  # the fake pauses after every word
    assert "hush" not in response.text


def test_no_more_than_two_hundred_are_kept(asking):
    client = asking()
    for number in range(205):
        client.post("/v1/completions", json={"model": "echo", "prompt": "a " * (number + 1), "max_tokens": 300})
    requests = client.get("/v1/recent").json()["requests"]
    assert [request["prompt_tokens"] for request in requests] == list(range(6, 206))


def test_a_cloud_has_no_policy(asking):
    client = asking()
    assert client.get("/v1/policy").status_code == client.put("/v1/policy", json={"threshold": 1}).status_code == 404


def test_an_edges_policy_is_shown_and_turned(asking):
    client = asking(role="edge", controls={"policy": FakePolicy()})
    point = {"threshold": 0.5, "accuracy": 0.9, "deferral_rate": 0.2, "cost": 3.0, "correction_rate": None}
    shown = {
        "kind": "confidence",
        "threshold": 0.5,
        "signal": "logprob",
        "curve": [point],
        "reliability": [],
        "drift": None,
    }
    assert client.get("/v1/policy").json() == shown
    assert client.put("/v1/policy", json={"threshold": 0.75}).json() == {**shown, "threshold": 0.75}
    assert client.put("/v1/policy", json={"threshold": 7}).status_code == 400
    assert client.put("/v1/policy", json={"threshold": "high"}).status_code == 400
    assert client.get("/v1/policy").json()["threshold"] == 0.75


def test_adapters_come_and_go(asking):
    adapters = FakeAdapters()
    client = asking(controls={"adapters": adapters}, allow_loading=True)
    body = {"name": "new", "path": "runs/new"}
    assert client.post("/v1/load_adapter", json=body).json() == {"name": "new", "status": "loaded"}
    assert adapters.loaded == {"new": "runs/new"}
    assert client.post("/v1/load_adapter", json={"name": "x", "path": "nothing"}).status_code == 400
    assert client.post("/v1/unload_adapter", json={"name": "new"}).json() == {"name": "new", "status": "unloaded"}
    assert client.post("/v1/unload_adapter", json={"name": "new"}).status_code == 404


def test_adapters_stay_where_loading_is_not_allowed(asking):
    adapters = FakeAdapters()
    client = asking(controls={"adapters": adapters})
    response = client.post("/v1/load_adapter", json={"name": "new", "path": "runs/new"})
    assert response.status_code == 404 and "--allow-loading" in response.json()["error"]["message"]
    assert not adapters.loaded


def test_the_page_may_load_nothing_from_elsewhere(asking):
    page = asking().get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<html" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy


def test_the_document_states_the_bounds(asking):
    schemas = asking().get("/openapi.json").json()["components"]["schemas"]
    (temperature, _) = schemas["ChatCompletionRequest"]["properties"]["temperature"]["anyOf"]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    assert schemas["ChatCompletionRequest"]["additionalProperties"] is False
    assert "HTTPValidationError" not in schemas


def test_the_backend_is_closed_at_the_end(asking):
    client = asking()
    client.__exit__(None, None, None)
    assert client.backend.closed
    client.__enter__()
