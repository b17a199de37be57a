"""Third-party clients against a server with a real model: chat, streaming, JSON schema, tools.

The clients may live in another environment: SHADOWTUNE_CLIENTS names its interpreter. All traffic stays on this
machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.config.serving import ServerConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.models import smollm2_135m
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.http.app import create_app
from shadowtune.serving.http.server import address_of, bind, make_server

pytestmark = [pytest.mark.slow, pytest.mark.model]
PROGRAMS = Path(__file__).with_name("client_programs.py")
INTERPRETER = os.environ.get("SHADOWTUNE_CLIENTS", sys.executable)
PACKAGES = {
    "openai": "openai",
    "litellm": "litellm",
    "instructor": "instructor",
    "guidellm": "guidellm",
    "langchain": "langchain_openai",
    "llama_index": "llama_index.llms.openai_like",
    "pydantic_ai": "pydantic_ai",
    "openai_agents": "agents",
    "dspy": "dspy",
    "llm": "llm",
}
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def url():
    """A server in a thread, with a shadow that changes nothing yet."""
    import threading

    directory = smollm2_135m()
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3)).eval()
    engine = Engine(base, tokenizer, {"m": (model, PromptFormat())}, Limits(max_sequences=4))
    config = ServerConfig(port=0, max_tokens=100)
    ready = threading.Event()
    with bind(config) as bound:
        server = make_server(create_app(engine, config, "cloud", counters=engine.counters), config, ready.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        assert ready.wait(120)
        yield address_of(bound)
        server.should_exit = True
        thread.join(120)


@pytest.mark.parametrize("client", PACKAGES)
def test_everything_that_the_client_offers_works(client, url):
    package = PACKAGES[client]
    found = subprocess.run([INTERPRETER, "-c", f"import {package}"], capture_output=True, text=True)
    if found.returncode != 0 and "ModuleNotFoundError" in found.stderr:
        pytest.skip(f"{INTERPRETER} has no {package}")
    command = [INTERPRETER, str(PROGRAMS), client, url, "m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes and all(outcomes.values()), outcomes
