"""One trained run, exported to every format and asked in every runtime: each answers what ``evaluate`` scored.

The requests are conversations, made into prompts by what the exported files say themselves. onnxruntime-genai, optimum
and an older transformers need an environment of their own: name its interpreter in SHADOWTUNE_RUNTIMES_PYTHON.
"""

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import pipeline

from shadowtune import ShadowConfig
from shadowtune.cli.main import main
from shadowtune.evaluation.run import FinishedRun
from shadowtune.export.loading import load_model
from shadowtune.export.runtimes import GgufModel
from shadowtune.training.run import train
from tests.support.runs import run_config

pytest.importorskip("xllamacpp", reason="needs pip install 'shadowtune[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'shadowtune[export]'")
pytestmark = pytest.mark.slow

INTERPRETER = os.environ.get("SHADOWTUNE_RUNTIMES_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("answer_elsewhere.py")
LIMIT = 6
"""Tokens of an answer: enough for the longest true one and its end."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned its twelve rows, with the questions and what its detached model answers them."""
    path = tmp_path_factory.mktemp("five")
    config = run_config(path, shadow=ShadowConfig(rank=4, update_width=3, num_shadow_layers=2), shadow_epochs=120.0)
    train(replace(config, epochs=20.0), quiet=True)
    run = FinishedRun.open(path / "run")
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    held_out = path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    found = run.evaluate("detached", source=str(held_out), max_new_tokens=LIMIT)
    assert found.accuracy > 0.5, "untrained, all runtimes could agree on nothing"
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in rows[1:]]
    assert main(["detach", str(path / "run"), "--out", str(path / "detached")]) == 0
    return path, conversations, found.predictions


@pytest.fixture(scope="module")
def exported(trained):
    """Paths of all exports, by format and quantization."""
    path, paths = trained[0], {}
    kinds = [("onnx", quantization) for quantization in ("f32", "f16", "int8", "int4")]
    for to, quantization in [*kinds, ("gguf", "f32"), ("gguf", "q8_0"), ("safetensors", "f32"), ("safetensors", "f16")]:
        out = path / f"{to}-{quantization}{'.gguf' if to == 'gguf' else ''}"
        arguments = ["export", str(path / "detached"), "--to", to, "--quant", quantization, "--out", str(out)]
        assert main(arguments) == 0
        paths[to, quantization] = out
    return paths


def elsewhere(runtime, package, directory, conversations):
    """Answers of a runtime in the interpreter that has it; skips, saying why, where there is none."""
    found = subprocess.run(
        [INTERPRETER, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"],
        capture_output=True,
        check=False,
    )
    if found.returncode:
        pytest.skip(f"{INTERPRETER} has no {package}; name one that has it in SHADOWTUNE_RUNTIMES_PYTHON")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [INTERPRETER, str(SCRIPT), runtime, str(directory), str(LIMIT)],
        input=json.dumps(conversations),
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "warning" in line.lower()], done.stderr
    return [answer.strip() for answer in json.loads(done.stdout.splitlines()[-1])["answers"]]


@pytest.mark.parametrize("place", ["detached", "safetensors-f32", "safetensors-f16"])
def test_transformers(place, trained, exported):
    path, conversations, expected = trained
    generate = pipeline("text-generation", model=str(path / place), dtype="float32")
    answers = [generate(chat, max_new_tokens=LIMIT, do_sample=False)[0]["generated_text"] for chat in conversations]
    assert [answer[-1]["content"].strip() for answer in answers] == expected


@pytest.mark.parametrize("place", ["detached", "safetensors-f32"])
def test_the_transformers_of_the_other_interpreter(place, trained, exported):
    path, conversations, expected = trained
    assert elsewhere("transformers", "transformers", path / place, conversations) == expected


@pytest.mark.parametrize("quantization", ["f32", "q8_0"])
def test_llama_cpp(quantization, trained, exported):
    _, conversations, expected = trained
    runtime = GgufModel(exported["gguf", quantization], 256, 1)
    answers = []
    for chat in conversations:
        body = json.dumps({"messages": chat, "max_tokens": LIMIT, "temperature": 0, "cache_prompt": False}).encode()
        address = runtime.server.listening_address + "/v1/chat/completions"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answers.append(json.load(response)["choices"][0]["message"]["content"].strip())
    assert answers == expected


def by_onnxruntime(directory, conversations):
    """Answers by onnxruntime itself, which needs a loop around it."""
    opened = load_model(directory)
    prompts = [opened.prompt_format.encode(chat, opened.tokenizer) for chat in conversations]
    answers = [opened.runtime.generate(prompt, LIMIT, opened.ends) for prompt in prompts]
    return [opened.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def test_onnxruntime(trained, exported):
    _, conversations, expected = trained
    assert by_onnxruntime(exported["onnx", "f32"], conversations) == expected


@pytest.mark.parametrize("quantization", ["f32", "f16", "int8", "int4"])
def test_onnxruntime_genai(quantization, trained, exported):
    _, conversations, expected = trained
    answers = elsewhere("genai", "onnxruntime_genai", exported["onnx", quantization], conversations)
    if quantization != "f32":  # rounded, it may answer otherwise than the model that was scored, but alike everywhere
        expected = by_onnxruntime(exported["onnx", quantization], conversations)
    assert answers == expected


@pytest.mark.parametrize("quantization", ["f32", "f16", "int8", "int4"])
def test_optimum_with_and_without_io_binding(quantization, trained, exported):
    _, conversations, expected = trained
    answers = elsewhere("optimum", "optimum.onnxruntime", exported["onnx", quantization], conversations)
    if quantization != "f32":
        expected = by_onnxruntime(exported["onnx", quantization], conversations)
    assert answers == expected * 2
