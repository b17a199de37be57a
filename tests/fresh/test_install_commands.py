"""Each command of the README's install section, in a fresh environment without constraints."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.fresh

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## Install")[1].split("\n## ")[0]
COMMANDS = [line.split("  #")[0].strip() for line in re.findall(r"^pip install .*$", SECTION, re.MULTILINE)]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
CHECKS = {
    "demo": "import peft, matplotlib, gguf",
    "serve": "import fastapi, uvicorn, httpx2, prometheus_client",
    "export": "import gguf, onnx, onnxruntime, xllamacpp",
}
"""What an extra must bring."""
TRY = """
import torch, shadowtune
from transformers import AutoConfig, AutoModelForCausalLM
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
model = shadowtune.ShadowForCausalLM.from_base(base).eval()
torch.nn.init.normal_(model.shadow.boundaries.injection_ups)
ids = torch.arange(3, 9)[None]
greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
cached, uncached = (model.generate(ids, use_cache=use, **greedy) for use in (True, False))
assert torch.equal(cached, uncached), (cached, uncached)
"""
"""Cached generation of an attached model: what failed where a new version of a dependency came along."""


def extras(command):
    return [name for names in re.findall(r"\[([\w,]+)\]", command) for name in names.split(",")]


def test_the_commands_name_every_extra_that_is_checked():
    assert {name for command in COMMANDS for name in extras(command)} == set(CHECKS)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_installs_what_it_says(command, tmp_path):
    uv = shutil.which("uv") or pytest.fail("uv is needed: pip install uv")
    python = tmp_path / "environment" / "bin" / "python"
    environment = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    environment.pop("PYTHONPATH", None)

    def run(*arguments, where=ROOT):
        result = subprocess.run(arguments, cwd=where, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{arguments}\n{result.stdout}{result.stderr}"

    run(uv, "venv", "--seed", str(tmp_path / "environment"))
    run(uv, "pip", "install", "--python", str(python), TORCH)  # the CPU build, as the README says
    run(uv, *shlex.split(command.replace("pip install", f"pip install --python {python}")))
    run(str(python), "-W", "error::FutureWarning", "-c", TRY, where=tmp_path)
    for extra in extras(command):
        run(str(python), "-c", CHECKS[extra], where=tmp_path)
