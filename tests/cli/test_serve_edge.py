import argparse

import pytest
from fastapi.testclient import TestClient

from shadowtune.cli import serve
from shadowtune.cli.main import COMMANDS, build_parser, main
from shadowtune.cli.options import KEY_VARIABLE, cloud_of
from shadowtune.config.serving import CurvePoint, PolicyConfig, Prices
from shadowtune.errors import ConfigError

NOBODY = "http://127.0.0.1:9"
CHAT = {"messages": [{"role": "user", "content": "say one"}], "max_tokens": 4, "temperature": 0}


def parsed(*words: str) -> argparse.Namespace:
    command = ["edge", "--cloud", NOBODY, "--cloud-model", "m", *map(str, words)]
    return build_parser(next(entry for entry in COMMANDS if entry.name == "serve edge")).parse_intermixed_args(command)


@pytest.fixture(scope="module")
def small(shadow_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("edge") / "small.v2"
    assert main(["detach", str(shadow_run), "--out", str(out)]) == 0
    return out


def served(monkeypatch, small, *words):
    """The app that the command would have served."""
    built = {}
    monkeypatch.setattr(serve, "run_server", lambda config, build: built.update(app=build()) or 0)
    assert (
        main(["serve", "edge", str(small), "--cloud", NOBODY, "--cloud-model", "m", "--cloud-retries", "0", *words])
        == 0
    )
    return built["app"]


def test_a_detached_run_is_served_and_a_missing_cloud_leaves_its_own_answers(small, monkeypatch):
    with TestClient(served(monkeypatch, small, "--threshold", "1")) as client:
        assert client.get("/health").json() == {"status": "ok", "role": "edge"}
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["small.v2"]
        told = client.post("/v1/chat/completions", json={"model": "small.v2", **CHAT})
        assert told.status_code == 200
        assert told.headers["x-shadowtune-side"] == "fallback"
        assert told.headers["x-shadowtune-reason"] == "cloud unreachable"
        changed = client.put("/v1/policy", json={"threshold": 0})
        assert changed.json()["threshold"] == 0
        own = client.post("/v1/chat/completions", json={"model": "small.v2", **CHAT})
        assert own.headers["x-shadowtune-side"] == "edge"
        assert own.json()["choices"] == told.json()["choices"]
        assert client.get("/v1/policy").json()["kind"] == "confidence"
        assert "cloud_circuit_open" in client.get("/metrics").text
        streamed = client.post("/v1/chat/completions", json={"model": "small.v2", "stream": True, **CHAT})
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_an_edge_without_a_cloud_answers_everything_itself(small, shadow_run, monkeypatch, capsys):
    built = {}
    monkeypatch.setattr(serve, "run_server", lambda config, build: built.update(app=build()) or 0)
    answers = []
    for source in (small, shadow_run):  # a run is detached
        assert main(["serve", "edge", str(source), "--name", "small", "--max-length", "40"]) == 0
        with TestClient(built["app"]) as client:
            assert client.get("/health").json() == {"status": "ok", "role": "edge"}
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 40
            answered = client.post("/v1/chat/completions", json={"model": "small", **CHAT})
            assert answered.headers["x-shadowtune-side"] == "edge"
            answers.append(answered.json()["choices"])
            assert client.get("/v1/policy").status_code == 404
            streamed = client.post("/v1/chat/completions", json={"model": "small", "stream": True, **CHAT})
            assert streamed.text.endswith("data: [DONE]\n\n")
    assert answers[0] == answers[1]
    for options in (["--policy", "p.json"], ["--threshold", "0.5"], ["--price-request", "1"], ["--cloud-model", "m"]):
        assert main(["serve", "edge", str(small), *options]) == 2
        assert f"{options[0]}: there is nothing to decide without a cloud" in capsys.readouterr().err


def test_the_name_may_be_another(small, monkeypatch):
    with TestClient(served(monkeypatch, small, "--name", "robot")) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["robot"]


def test_mid_answer_routing_falls_back_to_the_edge_s_own_answer(small, monkeypatch):
    answers = []
    for words in (("--policy-kind", "always-edge"), ("--policy-kind", "token", "--threshold", "1")):
        with TestClient(served(monkeypatch, small, *words)) as client:
            told = client.post("/v1/chat/completions", json={"model": "small.v2", **CHAT}).json()
            answers.append(told["choices"][0]["message"]["content"])
            metrics = client.get("/metrics").text
    assert answers[0] == answers[1]
    assert told["shadowtune"]["side"] == "fallback" and told["shadowtune"]["reason"] == "cloud unreachable"
    assert "shadowtune_engine_mid_answer_fallback 1.0" in metrics


def test_a_policy_that_reads_a_deferral_head_needs_one(small, monkeypatch, capsys):
    monkeypatch.setattr(serve, "run_server", lambda config, build: build() and 0)
    assert main(["serve", "edge", str(small), "--cloud", NOBODY, "--signal", "deferral"]) == 2
    assert "reads a deferral head, and" in capsys.readouterr().err.splitlines()[-1]


def test_options_replace_parts_of_the_file(tmp_path):
    curve = (CurvePoint(0.0, 0.5, 0.0, 0.0),)
    PolicyConfig(threshold=0.7, signal="margin", prices=Prices(1, 2, 3), curve=curve).save(tmp_path / "p.json")
    file = str(tmp_path / "p.json")
    assert serve.policy_of(parsed("--policy", file)) == PolicyConfig.load(tmp_path / "p.json")
    changed = serve.policy_of(parsed("--policy", file, "--threshold", 0.2, "--price-request", 9, "--tag", "[X]"))
    assert (changed.threshold, changed.signal, changed.tag) == (0.2, "margin", "[X]")
    assert (changed.prices, changed.curve) == (Prices(1, 2, 9), curve)
    assert serve.policy_of(parsed("--policy", file, "--signal", "first")).curve == ()
    assert serve.policy_of(parsed("--policy-kind", "verify")) == PolicyConfig(kind="verify")


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    assert cloud_of(parsed()).key is None
    monkeypatch.setenv(KEY_VARIABLE, "from environment")
    assert cloud_of(parsed()).key == "from environment"
    (tmp_path / "key").write_text("secret\n")
    assert cloud_of(parsed("--cloud-key-file", tmp_path / "key"), retries=7).key == "secret"
    assert cloud_of(parsed(), retries=7).retries == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "DIR/none.json"], "cannot read"),
        (["--threshold", "2"], "threshold must be"),
        (["--signal", "learned"], "needs its weights"),
        (["--cloud", "cloud:80"], "the cloud's address"),
        (["--cloud-key-file", "DIR/none"], "No such file"),
        (["--cloud-key-file", "DIR/empty"], "does not hold a key"),
        (["--cloud-deadline", "500"], "leaves no time for the edge"),
        (["--cloud-deadline", "0"], "deadline must be"),
        (["--port", "0"], "there is no"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, words, said, capsys):
    (tmp_path / "empty").touch()
    command = ["serve", "edge", str(tmp_path / "nothing"), "--cloud", NOBODY]
    assert main([*command, *(word.replace("DIR", str(tmp_path)) for word in words)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_key_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, " ")
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} is set and has no key"):
        cloud_of(parsed())
