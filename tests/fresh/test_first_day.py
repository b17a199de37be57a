"""From the installed wheel alone, in an empty directory: train, generate, save, load, detach, serve."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A directory without this repository, in which a user works."""
    return tmp_path_factory.mktemp("empty")


def shadowtune(directory, *arguments):
    """Run the command as a user does; what it prints. Anything deprecated that it uses is an error."""
    strict = {"PYTHONWARNINGS": "error::FutureWarning:shadowtune"}
    environment = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **strict}
    command = [sys.executable, "-m", "shadowtune", *arguments]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert "deprecat" not in result.stderr.lower()
    return result.stdout


def test_the_package_is_the_installed_one(empty):
    code = "import shadowtune; print(shadowtune.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=True).stdout
    assert REPOSITORY / "src" not in Path(where.strip()).parents


def test_the_main_job_runs_with_files_of_the_wheel(empty):
    shadowtune(empty, "train", "configs/tiny_cpu.yaml", "max_steps=3")
    assert (empty / "runs/tiny/model/model.safetensors").is_file()
    shadowtune(empty, "evaluate", "runs/tiny", "--mode", "all", "--limit", "4")


@pytest.mark.parametrize(
    "options", [[], ["--mode", "detached"], ["--speculate"]], ids=["attached", "detached", "drafts"]
)
def test_it_generates(empty, options):
    out = empty / "answer.json"
    prompt = ["generate", "runs/tiny", "wake me at six", "--max-new-tokens", "8"]
    shadowtune(empty, *prompt, *options, "--json", str(out))
    assert json.loads(out.read_text())["rows"]


def test_it_detaches_to_a_plain_directory(empty):
    shadowtune(empty, "detach", "runs/tiny", "--out", "runs/small")
    code = (
        "import torch; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained('runs/small');"
        "print(m.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape[1])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=True).stdout
    assert 4 <= int(said) <= 7


def test_it_serves_a_request(empty):
    command = [sys.executable, "-m", "shadowtune", "serve", "cloud", "runs/tiny", "--port", "0"]
    server = subprocess.Popen(command, cwd=empty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[0]
        body = json.dumps({"model": "tiny", "prompt": "wake me at six", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] >= 1
    finally:
        server.terminate()
        server.communicate(timeout=60)
