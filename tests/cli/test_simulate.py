import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shadowtune.cli.main import main
from shadowtune.config.serving import PolicyConfig
from tests.support.commands import ROWS, write_rows


@pytest.fixture(scope="module")
def edge(shadow_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("edge") / "detached"
    assert main(["detach", str(shadow_run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def sides(edge, shadow_run, lora_run):
    return ["--edge", str(edge), "--cloud", str(shadow_run), "--lora", str(lora_run), "--quiet"]


@pytest.fixture(scope="module")
def simulated(sides, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("simulated")
    policies = [place / "unsure.json", place / "tagged.json"]
    PolicyConfig(threshold=0.2).save(policies[0])
    PolicyConfig(kind="tag", tag="one").save(policies[1])
    command = ["simulate", str(data), *sides, "--output", str(place / "out"), "--json", str(place / "result.json")]
    command += [f"--policy={file}" for file in policies]
    assert main(command) == 0
    return place, command


def rows_of(file):
    return {row["policy"]: row for row in json.loads(file.read_text())["rows"]}


def recorded(place, side):
    return [json.loads(line) for line in (place / "out" / f"{side}.jsonl").read_text().splitlines()][1:]


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def test_every_policy_is_measured_on_what_both_sides_answered(simulated):
    place, _ = simulated
    rows = rows_of(place / "result.json")
    randoms = [f"random {rate}%" for rate in (10, 30, 50, 70, 90)]
    fixed = ["always-edge", *randoms, "always-cloud", "lora-cloud", "verify", "oracle"]
    assert list(rows) == [*fixed, "unsure", "tagged"]
    for policy, side in (("always-edge", "edge"), ("always-cloud", "cloud"), ("lora-cloud", "lora")):
        assert rows[policy]["accuracy"] == mean(answered["score"] for answered in recorded(place, side))
    tokens = mean(answered["prompt_tokens"] + answered["completion_tokens"] for answered in recorded(place, "cloud"))
    assert rows["always-cloud"]["cost"] == pytest.approx(tokens)
    assert all(0 < row["p50"] <= row["p90"] <= row["p99"] <= row["seconds"] for row in rows.values())


def test_scores_are_those_that_evaluate_gives(simulated, shadow_run, lora_run, data, tmp_path):
    place, _ = simulated
    rows = rows_of(place / "result.json")
    for run, mode, policy in (
        (shadow_run, "attached", "always-cloud"),
        (shadow_run, "detached", "always-edge"),
        (lora_run, "attached", "lora-cloud"),
    ):
        file = tmp_path / f"{policy}.jsonl"
        command = ["evaluate", str(run), "--mode", mode, "--data", str(data), "--predictions", str(file), "--quiet"]
        assert main([*command, "--max-new-tokens", "4", "--json", str(tmp_path / "result.json")]) == 0
        side = {"always-cloud": "cloud", "always-edge": "edge", "lora-cloud": "lora"}[policy]
        expected = [json.loads(line)[mode] for line in file.read_text().splitlines()]
        said = [answered["text"].strip() for answered in recorded(place, side)]
        assert [text[: len(answer)] for text, answer in zip(said, expected, strict=True)] == expected
        assert rows[policy]["accuracy"] == json.loads((tmp_path / "result.json").read_text())["rows"][0]["accuracy"]


def test_policies_defer_what_they_say(simulated):
    place, _ = simulated
    rows = rows_of(place / "result.json")
    edge = recorded(place, "edge")
    unsure = [answered["signals"]["logprob"] < 0.2 for answered in edge]
    assert rows["unsure"]["deferral_rate"] == mean(unsure)
    tagged = [answered["text"].strip().startswith("one") for answered in edge]
    assert rows["tagged"]["deferral_rate"] == mean(tagged)
    cloud = recorded(place, "cloud")
    scores = [(there if far else here)["score"] for here, there, far in zip(edge, cloud, unsure, strict=True)]
    assert rows["unsure"]["accuracy"] == mean(scores)


def test_a_verdict_for_each_policy_says_how_it_stands_to_the_cloud_alone(simulated, capsys):
    place, command = simulated
    assert main(command) == 0
    said = capsys.readouterr().out
    verdicts = json.loads((place / "result.json").read_text())["summaries"]
    assert [verdict["policy"] for verdict in verdicts] == [
        "always-edge", "lora-cloud", "verify", "oracle", "unsure", "tagged"
    ]  # fmt: skip
    rows = rows_of(place / "result.json")
    for verdict in verdicts:
        row, cloud = rows[verdict["policy"]], rows["always-cloud"]
        assert verdict["points"] == pytest.approx(100 * (row["accuracy"] - cloud["accuracy"]))
        assert verdict["latency_ratio"] == pytest.approx(row["p50"] / cloud["p50"])
        assert f"{verdict['policy']}: " in said


def test_files_hold_every_policy_every_threshold_and_a_picture(simulated):
    place, _ = simulated
    lines = [json.loads(line) for line in (place / "out" / "results.jsonl").read_text().splitlines()]
    curve = [line for line in lines if line["kind"] == "threshold"]
    assert len(lines) - len(curve) == 12
    assert [point["deferral_rate"] for point in curve][:: len(curve) - 1] == [0, 1]
    assert [point["threshold"] for point in curve] == sorted(point["threshold"] for point in curve)
    assert (place / "out" / "simulation.png").read_bytes().startswith(b"\x89PNG")


def test_another_simulation_runs_no_model_and_gives_the_same(simulated, monkeypatch):
    from shadowtune.serving.edge import local

    place, command = simulated
    before = (place / "out" / "results.jsonl").read_bytes()
    monkeypatch.setattr(local.LocalModel, "__init__", None)
    assert main(command) == 0
    assert (place / "out" / "results.jsonl").read_bytes() == before
    assert main([*command, "--rtt-ms", "900", "--jitter-ms", "0", "--arrivals", "closed:1"]) == 0
    far = rows_of(place / "result.json")
    assert far["always-cloud"]["p50"] > 0.9
    assert far["always-edge"]["p50"] < 0.9
    assert main(command) == 0


def test_other_requests_are_not_mixed_with_those_recorded(simulated, capsys):
    _, command = simulated
    assert main([*command, "--limit", "3"]) == 2
    assert "set of requests" in capsys.readouterr().err


def test_a_run_can_be_its_own_edge_and_one_request_is_enough(shadow_run, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    run = str(shadow_run)
    command = ["simulate", str(file), "--edge", run, "--cloud", run, "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--json", str(tmp_path / "result.json")]) == 0
    assert rows_of(tmp_path / "result.json")["always-cloud"]["deferral_rate"] == 1


class Echo(BaseHTTPRequestHandler):
    """A server with OpenAI's API that answers with the last word it is asked."""

    asked: list = []

    def do_GET(self):
        self._send("application/json", json.dumps({"data": [{"id": "echo"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body, self.headers.get("authorization")))
        word = body["messages"][-1]["content"].split()[-1]
        chunk = {"choices": [{"delta": {"content": word}, "finish_reason": None}]}
        last = {
            "choices": [{"delta": {}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        }
        self._send("text/event-stream", "".join(f"data: {json.dumps(part)}\n\n" for part in (chunk, last)))

    def _send(self, kind, text):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as opened:
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{opened.server_port}"
        opened.shutdown()
        thread.join()


def test_a_server_is_asked_in_a_users_words_with_its_key(edge, data, server, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    command = ["simulate", str(data), "--edge", str(edge), "--cloud", server, "--cloud-key-file", str(key), "--quiet"]
    assert main([*command, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]) == 0
    row = rows_of(tmp_path / "result.json")["always-cloud"]
    assert (row["accuracy"], row["cost"]) == (1, pytest.approx(7))
    path, body, authorization = Echo.asked[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": ROWS[-1]["prompt"]}]
    assert (body["temperature"], authorization) == (0, "Bearer secret")


@pytest.mark.parametrize(
    ("rows", "told"),
    [([], "holds no rows"), ([{"prompt": "say one"}], "line 1: no format fits the columns")],
)
def test_requests_without_rows_or_without_answers_are_one_line(rows, told, shadow_run, tmp_path, capsys):
    file = write_rows(tmp_path / "bad.jsonl", rows)
    run = str(shadow_run)
    assert main(["simulate", str(file), "--edge", run, "--cloud", run, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert told in error[0]


def test_what_cannot_be_simulated_is_one_line(edge, shadow_run, lora_run, data, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out"), "--quiet"]
    good = [str(data), "--edge", str(edge), "--cloud", str(shadow_run)]
    policy = tmp_path / "policy.json"
    replace(PolicyConfig(), threshold=0.1).save(policy)
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "policy.json"
    twin.write_text(policy.read_text())
    for command, told in (
        ([*good, "--arrivals", "sometimes"], "poisson:RATE"),
        ([*good, "--edge-speed", "0"], "edge_speed"),
        ([*good, "--policy", str(tmp_path / "none.json")], "none.json"),
        ([*good, "--policy", str(policy), "--policy", str(twin)], "have one name"),
        ([str(data), "--edge", "nowhere", "--cloud", str(shadow_run)], "nowhere does not exist"),
        ([str(data), "--edge", str(edge), "--cloud", str(tmp_path)], "not a run directory"),
        ([str(data), "--edge", str(lora_run), "--cloud", str(shadow_run)], "only a shadow runs without its base"),
        (["--edge", str(edge), "--cloud", "http://127.0.0.1:9"], "name a file of requests"),
        (["--edge", str(edge), "--cloud", str(shadow_run)], "held-out rows"),
    ):
        assert main(["simulate", *command, *out]) == 2, command
        error = capsys.readouterr().err.splitlines()
        assert told in error[-1]
        assert sum(line.startswith("shadowtune: error") for line in error) == 1
