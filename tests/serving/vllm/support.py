"""Tiny models for vLLM, whose attention on CPUs wants heads of 32, and their greedy tokens here."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from tests.support.bases import CONFIGS, tiny_base
from tests.support.shadows import perturb, tokens

PYTHON = os.environ.get("VLLM_PYTHON")
WORKER = Path(__file__).parent / "worker.py"
WIDTH = 128
LENGTH = 20
"""Tokens of a prompt: more than the sliding window of the tiny bases."""
NEW = 12

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no interpreter with vLLM; `make vllm` makes one"),
]


def sizes(model_type):
    """The values of a tiny base's config that are wider here."""
    wide = {"n_embd": WIDTH} if model_type == "gpt2" else {"hidden_size": WIDTH}
    if "head_dim" in CONFIGS[model_type]:
        wide["head_dim"] = 32
    if model_type == "opt":
        wide["word_embed_proj_dim"] = WIDTH
    return wide


def wide_base(model_type="llama", **overrides):
    base = tiny_base(model_type, **{**sizes(model_type), **overrides})
    base.generation_config.eos_token_id = None  # min_new_tokens masks the end token, vLLM's ignore_eos does not
    return base


def save_base(base, directory):
    base.save_pretrained(directory)
    base.config.name_or_path = base.name_or_path = str(directory)
    return base


def make(directory, model_type="llama", dtype=torch.float32, **settings):
    """Save a base and a perturbed shadow of it; return the model and the shadow's directory."""
    base = save_base(wide_base(model_type).to(dtype), directory / "base")
    settings = {"rank": 4, "update_width": 3, "alpha": 0.7, **settings}
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**settings))).eval()
    model.save_pretrained(directory / "shadow")
    return model, directory / "shadow"


def prompts(count=3):
    return tokens(count, LENGTH)


def greedy(model, mode="attached"):
    """The greedy continuation of each prompt by itself."""
    model.set_mode(mode)
    continued = []
    for ids in prompts().split(1):
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        continued.append(output[0, LENGTH:].tolist())
    model.set_mode("attached")
    return continued


def job(directory, **engine):
    return {"model": str(directory), "prompts": prompts().tolist(), "max_tokens": NEW, "engine": engine}


def run_jobs(jobs, directory, **environment):
    """Run jobs of the worker in one process; return their results by name."""
    (directory / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, str(WORKER), str(directory / "jobs.json"), str(directory / "results.json")]
    with (directory / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **environment})
    assert done.returncode == 0, (directory / "log.txt").read_text()[-4000:]
    return json.loads((directory / "results.json").read_text())
