"""vLLM's server, as ``serve cloud --engine vllm`` starts it: its answers, an edge in front of it, its end."""

import os
import signal
import subprocess
import time

import httpx2
import pytest
from fastapi.testclient import TestClient

from shadowtune.cli import serve
from shadowtune.cli.main import main
from shadowtune.evaluation.generation import GenerationOptions, generate_answer
from shadowtune.evaluation.run import FinishedRun
from tests.serving.vllm.support import PYTHON, needs_vllm, save_base, wide_base
from tests.support.commands import write_config, write_rows
from tests.support.tokenizers import tiny_tokenizer

pytestmark = needs_vllm

ASKED = "say one"
BODY = {"messages": [{"role": "user", "content": ASKED}], "max_tokens": 6, "temperature": 0}
START_SECONDS = 900
ENGINE = "--enforce-eager --max-model-len 128 --block-size 32 --disable-log-stats"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    base = wide_base()
    base.generation_config.eos_token_id = 2
    save_base(base, root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    config = write_config(root / "run.yaml", root / "base", write_rows(root / "rows.jsonl"), root / "run")
    assert main(["train", str(config), "--quiet"]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def address(trained):
    """The server's address. Its interpreter also runs our command, so vLLM's versions suffice for that."""
    environment = {
        **os.environ,
        "VLLM_PYTHON": PYTHON,
        "KMP_BLOCKTIME": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [PYTHON, "-m", "shadowtune", "serve", "cloud", str(trained), "--engine", "vllm", "--port", "0"]
    log = trained.parent / "server.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--vllm-arguments", ENGINE], env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
        )
    until, found = time.monotonic() + START_SECONDS, None
    while not _is_up(found):
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(1)
        words = log.read_text().split()
        found = f"http://127.0.0.1:{words[words.index('--port') + 1]}" if "--port" in words else None
    yield found
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()[-4000:]


def _is_up(address):
    if address is None:
        return False
    try:
        return httpx2.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="module")
def expected(trained):
    """The run's own greedy answer."""
    run, options = FinishedRun.open(trained), GenerationOptions(max_new_tokens=BODY["max_tokens"])
    return generate_answer(run.model, run.tokenizer, ASKED, options, prompt_format=run.prompt_format).answer


def test_it_answers_as_the_run_does(address, expected):
    assert [card["id"] for card in httpx2.get(f"{address}/v1/models", trust_env=False).json()["data"]] == ["run"]
    answered = httpx2.post(f"{address}/v1/chat/completions", json={"model": "run", **BODY}, trust_env=False, timeout=60)
    assert answered.json()["choices"][0]["message"]["content"] == expected


def test_an_edge_defers_to_it(address, trained, expected, tmp_path, monkeypatch):
    small, built = tmp_path / "small", {}
    assert main(["detach", str(trained), "--out", str(small)]) == 0
    monkeypatch.setattr(serve, "run_server", lambda config, build: built.update(app=build()) or 0)
    assert main(["serve", "edge", str(small), "--cloud", address, "--policy-kind", "always-cloud"]) == 0
    with TestClient(built["app"]) as client:
        answered = client.post("/v1/chat/completions", json={"model": "small", **BODY})
        assert answered.headers["x-shadowtune-side"] == "cloud"
        assert answered.json()["choices"][0]["message"]["content"] == expected
