from prometheus_client.parser import text_string_to_metric_families

from tests.serving.http.fakes import FakeBackend


def samples(client):
    """Every number by its name and labels."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for one in families for sample in one.samples}


def test_requests_tokens_and_decisions_are_counted(asking, chat):
    client = asking()
    client.post("/v1/chat/completions", json=chat("a b c", n=2))
    client.post("/v1/chat/completions", json=chat(stream=True, prediction={"type": "content", "content": "x y"}))
    client.post("/v1/chat/completions", json=chat(model="nobody"))
    client.post("/v1/chat/completions", content=b"{")
    client.get("/health")
    found = samples(client)
    assert found["shadowtune_requests_total", "200", "cloud"] == 2
    assert found["shadowtune_requests_total", "", "404"] == found["shadowtune_requests_total", "", "415"] == 1
    assert found["shadowtune_tokens_total", "echo", "prompt"] == 3 + 4
    assert found["shadowtune_tokens_total", "completion", "echo"] == 6 + 4
    assert found["shadowtune_tokens_total", "accepted_prediction", "echo"] == 2
    assert found["shadowtune_decisions_total", "attached", "cloud"] == 2
    assert found["shadowtune_request_seconds_count", "cloud"] == 2
    assert found["shadowtune_first_token_seconds_count", "cloud"] == 2
    assert found["shadowtune_requests_under_way",] == 0


def test_broken_answers_are_counted_by_what_broke_them(asking, chat):
    client = asking(timeout=0.1)
    for model, stream in (("late", True), ("hang", True), ("mute", False)):
        client.post("/v1/chat/completions", json=chat(model=model, stream=stream))
    found = samples(client)
    assert found["shadowtune_broken_answers_total", "500"] == 1
    assert found["shadowtune_broken_answers_total", "504"] == 2
    assert client.get("/v1/recent").json()["requests"] == []


def test_the_backends_own_numbers_are_shown(asking):
    running = {"running": 3, "waiting": 5}
    client = asking(controls={"counters": lambda: running})
    found = samples(client)
    assert found["shadowtune_engine_running",] == 3 and found["shadowtune_engine_waiting",] == 5
    running["running"] = 4
    assert samples(client)["shadowtune_engine_running",] == 4


def test_two_apps_count_apart(asking, chat):
    one, other = asking(), asking(FakeBackend())
    one.post("/v1/chat/completions", json=chat())
    assert ("shadowtune_requests_total", "200", "cloud") not in samples(other)
