"""Runs on bases whose chat template puts something before every answer: learned, scored and served as the content."""

import pytest
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowtune.cli.loading import load_adapters
from shadowtune.cli.main import main
from shadowtune.config.serving import ServerConfig
from shadowtune.evaluation.run import FinishedRun
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.http.app import create_app
from tests.support.chats import GPT_OSS, QWEN3, chat_tokenizer, learned_run

PAIRS = {"tea": "hot", "sea": "wet", "sun": "big"}


@pytest.mark.parametrize("template", [QWEN3, GPT_OSS], ids=["qwen3", "gpt_oss"])
def test_such_a_run_is_scored_served_and_deployed_by_its_content(template, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in PAIRS.items()
    ]
    run = learned_run(tmp_path, rows, chat_tokenizer(template), 80)
    finished = FinishedRun.open(run)
    for mode in ("attached", "detached"):
        found = finished.evaluate(mode, source=str(tmp_path / "rows.jsonl"))
        assert (found.accuracy, found.predictions) == (1.0, list(PAIRS.values()))
    served = load_adapters({"tiny": run}, lambda line: None)
    app = create_app(Engine(served.base, served.tokenizer, served.adapters, Limits()), ServerConfig(), "cloud")
    with TestClient(app) as client:
        for one, other in PAIRS.items():
            body = {"model": "tiny", "messages": [{"role": "user", "content": one}], "temperature": 0, "max_tokens": 20}
            (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
            assert (choice["message"]["content"].strip(), choice["finish_reason"]) == (other, "stop")
    assert main(["detach", str(run), "--out", str(tmp_path / "small")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    for one, other in PAIRS.items():
        messages = [{"role": "user", "content": one}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == other
