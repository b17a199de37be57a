"""An edge before llama.cpp's own server: a cloud that is not ours, started for real."""

import asyncio
import importlib.util
import json
import logging

import pytest

from shadowtune.config.serving import CloudConfig, PolicyConfig
from shadowtune.export.exporting import FORMATS
from shadowtune.export.loading import load_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.router import Router
from tests.export.support import plain_model
from tests.serving.edge.foreign import CHAT, COUNT, MARKS, SCHEMA, TEMPLATE, TOOL, direct, routed, text, unsure_case
from tests.serving.edge.llama_cpp import llama_server
from tests.serving.edge.models import FORMAT, ask, gather
from tests.support.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights for the cloud, a GGUF file, and for the edge, with a vocabulary that can write JSON."""
    folder = tmp_path_factory.mktemp("foreign")
    model, tokenizer = plain_model()[0], tiny_tokenizer(TEMPLATE, more=MARKS)
    model.config.max_position_embeddings = 1024  # the tools alone have 300 characters
    found = {"gguf": folder / "model.gguf", "safetensors": folder / "safetensors"}
    found["safetensors"].mkdir()
    for kind, path in found.items():
        FORMATS[kind].write(model, tokenizer, path, "f32", FORMAT)
    return found


@pytest.fixture(scope="module")
def address(files):
    with llama_server(files["gguf"]) as (_, url):
        yield url


def opened(files):
    return load_model(files["safetensors"])


@pytest.mark.parametrize("model", [None, "nobody"])
def test_it_answers_what_is_deferred_under_any_model_name(files, address, model):
    request = ask(max_tokens=COUNT)
    expected = direct(address, "completions", prompt=list(request.prompt), max_tokens=COUNT)["choices"][0]["text"]
    chunks, decision, _ = routed(opened(files), address, request, PolicyConfig(kind="always-cloud"), model)
    assert text(chunks) == expected != ""
    assert (decision.side, decision.reason) == ("cloud", "always-cloud")
    assert chunks[-1].finish_reason == "length" and chunks[-1].usage.completion_tokens == COUNT
    assert decision.cost > 0


def test_its_log_probabilities_are_those_of_the_same_weights_here(files, address):
    request = ask(max_tokens=4, top_logprobs=2)
    own, _, _ = routed(opened(files), address, request, PolicyConfig(kind="always-edge"))
    theirs, _, _ = routed(opened(files), address, request, PolicyConfig(kind="always-cloud"))
    both = [[token for chunk in chunks for token in chunk.tokens] for chunks in (own, theirs)]
    assert [token.text for token in both[0]] == [token.text for token in both[1]] and len(both[1]) == 4
    for ours, other in zip(*both, strict=True):
        assert other.logprob == pytest.approx(ours.logprob, abs=0.02)
        assert len(other.top) == 2


def test_a_cloud_without_predictions_answers_anew_and_the_client_sees_one_answer(files, address):
    request, threshold, whole = unsure_case(opened(files))
    chunks, decision, counters = routed(
        opened(files), address, request, PolicyConfig(kind="token", threshold=threshold)
    )
    assert text(chunks) == whole  # both have the same weights
    assert (decision.side, decision.reason) == ("cloud", "continued")
    assert counters["mid_answer_continued"] == 1
    assert chunks[-1].usage.completion_tokens == COUNT  # the cloud generated all of them
    assert chunks[-1].usage.accepted_prediction_tokens == 0


def cut_off(address, events):
    """Return a coroutine function for ``cloud_that``: the server's own answer, cut off after so many events."""
    host, port = address.removeprefix("http://").split(":")

    async def relay(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        upstream, sink = await asyncio.open_connection(host, int(port))
        sink.write(head + await reader.readexactly(length))
        seen = b""
        while seen.count(b"data: ") <= events and (part := await upstream.read(1)):
            seen += part
            writer.write(part)
        await writer.drain()
        sink.close()
        writer.close()

    return relay


def test_an_answer_that_breaks_off_after_the_deferral_is_completed_by_the_edge(files, address, caplog):
    request, threshold, whole = unsure_case(opened(files))
    policy = PolicyConfig(kind="token", threshold=threshold)

    async def run():
        server = await asyncio.start_server(cut_off(address, 5), "127.0.0.1", 0)
        config = CloudConfig(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", model="x", retries=0)
        router = Router(LocalModel(opened(files), "tiny"), RemoteEndpoint(config), policy)
        try:
            chunks, stream = await gather(router, request)
            return chunks, stream.decision, router.counters()
        finally:
            await router.aclose()
            server.close()

    with caplog.at_level(logging.WARNING, "shadowtune.serving"):
        chunks, decision, counters = asyncio.run(run())
    assert text(chunks) == whole
    assert (decision.side, decision.reason) == ("fallback", "cloud broke off")
    assert counters["mid_answer_fallback"] == 1
    assert "cloud broke off" in caplog.text and "the edge completes the answer" in caplog.text


def test_a_server_that_is_gone_leaves_the_edges_answer(files):
    request, threshold, whole = unsure_case(opened(files))
    with llama_server(files["gguf"]) as (process, url):
        process.kill()
        process.wait()
    for policy in (PolicyConfig(kind="token", threshold=threshold), PolicyConfig(kind="always-cloud")):
        chunks, decision, _ = routed(opened(files), url, request, policy)
        assert text(chunks) == whole
        assert (decision.side, decision.reason) == ("fallback", "cloud unreachable")


def test_a_schema_holds(files, address):
    request = ask(prompt=None, messages=CHAT, schema=SCHEMA, max_tokens=200)
    chunks, decision, _ = routed(opened(files), address, request, PolicyConfig(kind="always-cloud"))
    assert json.loads(text(chunks))["a"] in ("x", "y")
    assert decision.side == "cloud"


def test_a_request_with_tools_gets_what_the_server_itself_answers(files, address):
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300}
    expected = direct(address, messages=CHAT, **fields)["choices"][0]["message"]
    request = ask(prompt=None, messages=CHAT, tools=(TOOL,), forwarded={"tool_choice": "required"}, max_tokens=300)
    chunks, decision, _ = routed(opened(files), address, request, PolicyConfig(kind="always-cloud"))
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    found = [each["function"] for each in expected.get("tool_calls", [])]
    assert text(chunks) == (expected["content"] or "") and decision.side == "cloud"
    assert "".join(call.arguments for call in calls) == "".join(each["arguments"] for each in found)
    assert text(chunks) or calls
