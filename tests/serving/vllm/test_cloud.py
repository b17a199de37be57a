"""An edge before vLLM's server of a plain model: a cloud that is not ours, without predictions."""

import json
import logging
import os
import subprocess
import time

import httpx2
import pytest

from shadowtune.config.serving import PolicyConfig
from shadowtune.export.loading import wrap_model
from shadowtune.serving.requests import RequestError
from tests.serving.edge.foreign import CHAT, COUNT, MARKS, SCHEMA, TEMPLATE, TOOL, direct, routed, text, unsure_case
from tests.serving.edge.models import FORMAT, ask
from tests.serving.vllm.support import PYTHON, needs_vllm, save_base, wide_base
from tests.support.tokenizers import tiny_tokenizer

pytestmark = needs_vllm
START_SECONDS = 900
PORT = 18391
CLOUD = PolicyConfig(kind="always-cloud")
ENVIRONMENT = {
    "KMP_BLOCKTIME": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = (
    "--enforce-eager --max-model-len 1024 --block-size 32 --max-logprobs 2 --dtype float32 --disable-log-stats "
    "--enable-auto-tool-choice --tool-call-parser hermes"
)


@pytest.fixture(scope="module")
def model():
    base = wide_base().eval()
    base.generation_config.eos_token_id = 2
    base.config.max_position_embeddings = 1024  # the tools alone have 300 characters
    return base, tiny_tokenizer(TEMPLATE, more=MARKS)


@pytest.fixture(scope="module")
def opened(model):
    return wrap_model(*model, FORMAT)


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_base(model[0], folder / "base")
    model[1].save_pretrained(folder / "base")
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
    command += ["--served-model-name", "plain", "--host", "127.0.0.1", "--port", str(PORT), *OPTIONS.split()]
    url, log = f"http://127.0.0.1:{PORT}", folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=subprocess.STDOUT)
    until = time.monotonic() + START_SECONDS
    while not _is_up(url):
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(1)
    yield url
    process.terminate()
    process.wait(120)


def _is_up(url):
    try:
        return httpx2.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def test_it_answers_what_is_deferred(opened, address):
    request = ask(max_tokens=COUNT)
    own, _, _ = routed(opened, address, request, PolicyConfig(kind="always-edge"))
    chunks, decision, _ = routed(opened, address, request, CLOUD)
    assert text(chunks) == text(own) != ""  # the same weights
    assert (decision.side, decision.reason) == ("cloud", "always-cloud")
    assert chunks[-1].finish_reason == "length" and chunks[-1].usage.completion_tokens == COUNT


def test_under_an_unknown_model_name_the_edge_answers_and_says_why(opened, address):
    request = ask(max_tokens=COUNT)
    own, _, _ = routed(opened, address, request, PolicyConfig(kind="always-edge"))
    chunks, decision, _ = routed(opened, address, request, CLOUD, model="nobody")
    assert text(chunks) == text(own)
    assert (decision.side, decision.reason) == ("fallback", "cloud answered 404")


def test_its_log_probabilities_are_those_of_the_same_weights_here(opened, address):
    request = ask(max_tokens=4, top_logprobs=2)
    own, _, _ = routed(opened, address, request, PolicyConfig(kind="always-edge"))
    theirs, decision, _ = routed(opened, address, request, CLOUD)
    both = [[token for chunk in chunks for token in chunk.tokens] for chunks in (own, theirs)]
    assert [token.text for token in both[0]] == [token.text for token in both[1]] and len(both[1]) == 4
    for ours, other in zip(*both, strict=True):
        assert other.logprob == pytest.approx(ours.logprob, abs=0.02) and len(other.top) == 2
    assert decision.side == "cloud"


def test_more_log_probabilities_than_it_allows_are_the_edges_and_the_log_says_why(opened, address, caplog):
    request = ask(max_tokens=4, top_logprobs=3)
    own, _, _ = routed(opened, address, request, PolicyConfig(kind="always-edge"))
    with caplog.at_level(logging.WARNING, "shadowtune.serving"):
        chunks, decision, _ = routed(opened, address, request, CLOUD)
    assert text(chunks) == text(own)
    assert (decision.side, decision.reason) == ("fallback", "cloud answered 400")
    assert "cloud answered 400" in caplog.text and "logprobs" in caplog.text


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_a_schema_holds(opened, address, chat):
    prompt = {"prompt": None, "messages": CHAT} if chat else {}
    request = ask(**prompt, schema=SCHEMA, max_tokens=200)
    chunks, decision, _ = routed(opened, address, request, CLOUD)
    assert decision.side == "cloud"
    answer = text(chunks)
    if chunks[-1].finish_reason == "stop":
        assert json.loads(answer)["a"] in ("x", "y")
    else:  # white space up to the limit, which the grammar allows
        assert answer.startswith("{") and not answer.strip('{}"axy: \n\t')


def test_a_request_with_tools_gets_what_the_server_itself_answers(opened, address):
    fields = {"tools": [TOOL], "tool_choice": "auto", "max_tokens": 100}
    expected = direct(address, model="plain", messages=CHAT, **fields)["choices"][0]["message"]
    request = ask(prompt=None, messages=CHAT, tools=(TOOL,), forwarded={"tool_choice": "auto"}, max_tokens=100)
    chunks, decision, _ = routed(opened, address, request, CLOUD)
    assert decision.side == "cloud" and text(chunks) == expected["content"] != ""


def test_a_required_call_arrives_in_pieces(opened, address):
    request = ask(prompt=None, messages=CHAT, tools=(TOOL,), forwarded={"tool_choice": "required"}, max_tokens=100)
    chunks, decision, _ = routed(opened, address, request, CLOUD)
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert decision.side == "cloud" and not text(chunks)
    assert [call.name for call in calls if call.name] == ["go"] and len(calls) > 1


def test_tools_reach_the_cloud_of_an_edge_without_a_chat_template(model, address):
    opened = wrap_model(model[0], tiny_tokenizer(more=MARKS), FORMAT)
    request = ask(prompt=None, messages=CHAT, tools=(TOOL,), forwarded={"tool_choice": "auto"}, max_tokens=COUNT)
    chunks, decision, _ = routed(opened, address, request, CLOUD)
    assert decision.side == "cloud" and text(chunks)
    with pytest.raises(RequestError, match="tools cannot reach it"):  # neither can answer
        routed(opened, address, request, CLOUD, model="nobody")


def test_a_deferral_in_mid_answer_is_one_answer(opened, address):
    request, threshold, whole = unsure_case(opened)
    chunks, decision, counters = routed(opened, address, request, PolicyConfig(kind="token", threshold=threshold))
    assert text(chunks) == whole
    assert (decision.side, decision.reason) == ("cloud", "continued")
    assert counters["mid_answer_continued"] == 1
    assert chunks[-1].usage.completion_tokens == COUNT and chunks[-1].usage.accepted_prediction_tokens == 0
