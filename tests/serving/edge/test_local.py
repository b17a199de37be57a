import asyncio
import math
import threading

import pytest
import torch

from shadowtune.export.loading import load_model
from shadowtune.export.runtimes import TorchModel
from shadowtune.serving.edge import local as local_module
from shadowtune.serving.edge.local import LocalModel, LocalStream
from shadowtune.serving.requests import RequestError, SamplingParams
from tests.export.support import plain_model
from tests.serving.edge.models import GREEDY, KINDS, PROMPT, answered, ask, gather, local, write

MODEL, TOKENIZER = plain_model()
GREEDY_TOKENS = TorchModel(MODEL).generate(PROMPT, 6)


def told(pieces):
    return [token for piece in pieces for token in piece.tokens]


def expected_logs(tokens):
    with torch.no_grad():
        logits = MODEL(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_says_what_its_runtime_says(kind, tmp_path):
    model = local(kind, tmp_path)
    runtime = model._opened.runtime
    greedy = runtime.generate(PROMPT, 6)
    pieces, answer = answered(model, ask(top_logprobs=0))
    assert [token.id for token in told(pieces)] == greedy == GREEDY_TOKENS
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(greedy)
    assert len(pieces) == 7
    assert pieces[-1].finish_reason == "length"
    assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.completion_tokens) == (4, 6)
    assert answer.decision.side == "edge"


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_signals_are_those_of_transformers(kind, tmp_path):
    pieces, answer = answered(local(kind, tmp_path), ask(top_logprobs=3))
    logs = expected_logs(GREEDY_TOKENS)
    near = 5e-3 if kind == "gguf" else 1e-4
    found = told(pieces)
    own = torch.stack([row[token] for row, token in zip(logs, GREEDY_TOKENS, strict=True)])
    assert [token.logprob for token in found] == pytest.approx(own.tolist(), abs=near)
    values, ids = logs.topk(3)
    assert [[logprob for _, _, logprob in token.top] for token in found] == [
        pytest.approx(row, abs=near) for row in values.tolist()
    ]
    if kind != "gguf":  # whose cache of 16 bits may swap neighbours
        assert [[id_ for id_, _, _ in token.top] for token in found] == ids.tolist()
    chances = logs.exp()
    pairs = chances.topk(2).values
    entropy = -(chances * logs).sum(-1).mean() / math.log(97)
    signals = answer.signals
    assert signals.logprob == pytest.approx(own.mean().exp().item(), abs=near)
    assert signals.margin == pytest.approx((pairs[:, 0] - pairs[:, 1]).min().item(), abs=near)
    assert signals.entropy == pytest.approx(1 - entropy.item(), abs=0.01 if kind == "gguf" else 1e-4)
    assert signals.first == pytest.approx(own[0].exp().item(), abs=near)
    assert signals.length == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_ends_the_answer_and_counts_among_its_tokens(kind, tmp_path):
    end = GREEDY_TOKENS[2]
    pieces, answer = answered(local(kind, tmp_path, end), ask(top_logprobs=0))
    assert [token.id for token in told(pieces)] == GREEDY_TOKENS[:2]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(GREEDY_TOKENS[:2])
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage.completion_tokens == 3
    assert answer.signals.length == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_ignored_end_ends_nothing(kind, tmp_path):
    pieces, _ = answered(local(kind, tmp_path, GREEDY_TOKENS[2]), ask(ignore_eos=True))
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(kind, tmp_path):
    text = TOKENIZER.decode(GREEDY_TOKENS)
    stop = text[2:4]
    pieces, _ = answered(local(kind, tmp_path), ask(stop=(stop,)))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_and_a_bias_decides(kind, tmp_path):
    model = local(kind, tmp_path)

    async def run():
        drawn = SamplingParams(temperature=1.0, seed=3)
        texts = [
            "".join(piece.text for piece in (await gather(model, ask(sampling=sampling)))[0])
            for sampling in (drawn, drawn, GREEDY, SamplingParams(temperature=0, logit_bias={20: 100.0}))
        ]
        await model.aclose()
        return texts

    once, again, greedy, biased = asyncio.run(run())
    assert once == again != greedy
    assert biased == TOKENIZER.decode([20] * 6)


def test_messages_go_through_the_format_that_the_files_keep(tmp_path):
    model = local("safetensors", tmp_path)
    pieces, _ = answered(model, ask(prompt=None, messages=[{"role": "user", "content": "hi"}]))
    ids = TOKENIZER("say hi")["input_ids"]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(TorchModel(MODEL).generate(ids, 6))
    assert pieces[-1].usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "other"}, 404, "model", "tiny"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": [97]}, 400, "prompt", "0 to 96"),
        ({"prompt": [5] * 128, "max_tokens": None}, 400, "prompt", "takes 128 with the answer"),
        ({"prompt": [5] * 123}, 400, "max_tokens", "ask for 5 at most"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"prompt": None, "messages": []}, 400, "messages", "no messages"),
        ({"prompt": "\ud800"}, 400, "prompt", "UTF-8"),
        ({"prompt": None, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "UTF-8"),
        ({"sampling": SamplingParams(temperature=0, logit_bias={97: 1.0})}, 400, "logit_bias", "0 to 96"),
    ],
)
def test_what_cannot_be_answered_is_refused(fields, status, param, said, tmp_path):
    with pytest.raises(RequestError, match=said) as caught:
        answered(local("safetensors", tmp_path), ask(**fields))
    assert (caught.value.status, caught.value.param) == (status, param)


def test_an_answer_without_a_limit_fills_the_positions(tmp_path):
    pieces, _ = answered(local("safetensors", tmp_path), ask(prompt=[5] * 120, max_tokens=None, ignore_eos=True))
    assert pieces[-1].usage.completion_tokens == 8


def test_a_full_line_is_refused_and_a_closed_answer_makes_room(tmp_path):
    model = local("safetensors", tmp_path, max_queue=1)

    async def run():
        long = ask(max_tokens=120, ignore_eos=True)
        first, second = await model.generate(long), await model.generate(long)
        with pytest.raises(RequestError, match="1 requests wait already") as caught:
            await model.generate(long)
        assert caught.value.status == 429
        assert model.counters() == {"running": 1, "waiting": 1}
        await second.aclose()  # never began
        third = await model.generate(ask())
        await first.aclose()  # at work
        pieces = [piece async for piece in first]
        assert all(piece.finish_reason is None for piece in pieces)
        whole = [piece async for piece in third]
        await model.aclose()
        return whole

    assert asyncio.run(run())[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("kind", KINDS)
def test_closing_stops_at_the_next_token_and_frees_the_model(kind, tmp_path):
    model = local(kind, tmp_path)

    async def run():
        answer = await model.generate(ask(max_tokens=100, ignore_eos=True))
        await anext(aiter(answer))
        await answer.aclose()
        assert model.counters() == {"running": 0, "waiting": 0}
        pieces, _ = await gather(model, ask())
        await model.aclose()
        return answer, pieces

    answer, pieces = asyncio.run(run())
    assert answer.signals.length == 0
    assert pieces[-1].usage.completion_tokens == 6


def test_closing_the_model_finishes_what_was_begun_and_takes_no_more(tmp_path):
    model = local("safetensors", tmp_path)

    async def run():
        answer = await model.generate(ask())
        await model.aclose()
        with pytest.raises(RequestError) as caught:
            await model.generate(ask())
        assert caught.value.status == 503
        return [piece async for piece in answer]

    assert asyncio.run(run())[-1].finish_reason == "length"


def test_a_failing_model_is_a_clear_error_and_the_next_request_works(tmp_path):
    opened = load_model(write("safetensors", tmp_path))
    model, step = LocalModel(opened, "tiny"), opened.runtime._step

    def failing(*_):
        raise MemoryError

    async def run():
        opened.runtime._step = failing
        with pytest.raises(RequestError, match="the edge's model failed: MemoryError") as caught:
            await gather(model, ask())
        assert caught.value.status == 500
        opened.runtime._step = step
        pieces, _ = await gather(model, ask())
        await model.aclose()
        return pieces

    assert asyncio.run(run())[-1].finish_reason == "length"


def test_a_second_owner_does_not_wait_for_all_of_the_first(tmp_path, monkeypatch):
    """The order in which answers run, while the model's thread is held until all stand in line."""
    go, order = threading.Event(), []
    model = local("safetensors", tmp_path)
    run = LocalStream.run

    def noted(self):
        assert go.wait(60)
        order.append(self.owner)
        run(self)

    monkeypatch.setattr(LocalStream, "run", noted)

    async def work():
        answers = [await model.generate(ask(owner=owner)) for owner in ("a", "a", "a", "a", "b")]
        go.set()
        for answer in answers:
            [piece async for piece in answer]
        await model.aclose()

    asyncio.run(work())
    assert order[:3] in (["a", "b", "a"], ["b", "a", "a"]) and sorted(order) == list("aaaab")


@pytest.mark.parametrize("kind", [each for each in KINDS if each.values[0] == "gguf"])
def test_a_gguf_file_fits_a_schema_by_llama_cpps_grammar(kind, tmp_path):
    """The tiny vocabulary has letters and no brackets, so the schema is one that letters fit."""
    pieces, _ = answered(local(kind, tmp_path), ask(schema={"const": True}, max_tokens=20))
    assert "".join(piece.text for piece in pieces).strip() == "true"
    with pytest.raises(RequestError, match="min_tokens is not supported by a GGUF file"):
        answered(local(kind, tmp_path), ask(min_tokens=2))


def test_a_model_that_hangs_is_left_behind(tmp_path, monkeypatch):
    released, entered = threading.Event(), threading.Event()
    model = local("safetensors", tmp_path, close_seconds=0.1)

    def hang(*_):
        entered.set()
        released.wait()
        yield

    monkeypatch.setattr(local_module, "decoding_steps", hang)
    monkeypatch.setattr(local_module, "CLOSE_SECONDS", 0.1)

    async def work():
        await model.generate(ask())
        await asyncio.to_thread(entered.wait)
        await model.aclose()
        return model.failure()

    try:
        assert "did not stop" in asyncio.run(work())
    finally:
        released.set()
