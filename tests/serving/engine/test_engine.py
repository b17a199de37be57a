"""Outputs of a batch equal those of each request alone."""

import asyncio

import pytest
import torch

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.prepacked_linear import PrepackedForward
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, UnsupportedArchitectureError
from shadowtune.serving.engine.model_runner import ModelRunner
from shadowtune.serving.requests import RequestError
from tests.serving.engine.support import (
    adapter,
    alone,
    answers,
    ask,
    ask_all,
    engine,
    one_model,
    pieces_of,
    prompt,
    request,
    with_engine,
)
from tests.support.bases import CONFIGS, tiny_base
from tests.support.shadows import perturbed_model

SERVED = sorted(set(CONFIGS) - {"qwen3_next"})
MANY = [(5, 12), (9, 3), (2, 20), (17, 1), (11, 7), (3, 15), (1, 9)]
"""Prompt and output lengths: sequences start and end at different times, and windows of 16 fill up."""
SPECULATIONS = [
    None,
    SpeculationConfig(),
    SpeculationConfig(length=3, drafter="shadow"),
    SpeculationConfig(length=4, drafter="ngram"),
    SpeculationConfig(length=2),
]


def many(models=("a",)):
    return [request(models[index % len(models)], length, max_tokens=new) for index, (length, new) in enumerate(MANY)]


def expected(models, requests):
    return [alone(models[each.model], list(each.prompt), each.max_tokens) for each in requests]


@pytest.mark.parametrize("model_type", SERVED)
def test_continuous_batching_changes_no_output(model_type):
    models = one_model(model_type)
    requests = many()
    served = engine(models, max_sequences=3, prefill_tokens=8, speculation=None)
    assert answers(served, requests) == expected(models, requests)
    bare = alone(models["a"].base, list(requests[2].prompt), 20)
    assert bare != alone(models["a"], list(requests[2].prompt), 20), "the shadow must change the answers"


@pytest.mark.parametrize("speculation", SPECULATIONS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
def test_drafts_change_no_answer(model_type, speculation):
    models = one_model(model_type, draft_rank=4)
    requests = many()
    served = engine(models, max_sequences=3, speculation=speculation)
    assert answers(served, requests) == expected(models, requests)


@pytest.mark.parametrize("speculation", [None, SpeculationConfig(length=3)], ids=["plain", "drafts"])
def test_models_of_different_ranks_share_a_batch_with_the_bare_base(speculation):
    base = tiny_base()
    models = {
        "a": adapter(base, 1),
        "b": adapter(base, 2, rank=7, update_width=5, alpha=1.5),
        "c": adapter(base, 3, update=False),
        "d": adapter(base, 4, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_shadow_layers=2),
        "e": adapter(base, 5, depth_sharing="full"),
    }
    requests = [request(model, 5 + index, max_tokens=12) for index, model in enumerate([*models, "base", "b", "a"])]
    served = engine(models, speculation=speculation)
    assert answers(served, requests) == expected({**models, "base": base}, requests)
    assert served.counters()["passes"] < 40, "they shared passes"


@pytest.mark.parametrize("speculation", [None, SpeculationConfig(length=3)], ids=["plain", "drafts"])
def test_stateless_models_share_a_batch_and_run_their_backbones_where_something_reads_them(speculation):
    base = tiny_base()
    common = {"variant": "stateless", "alpha": 0.003}
    models = {
        "a": adapter(base, 1, **common),
        "b": adapter(base, 2, **common, rank=7, channel_scaling=True),
        "c": adapter(base, 3, **common, depth_sharing="full", logit_interpolation=0.4),
        "paper": adapter(base, 4),
    }
    seen = []
    models["a"].shadow.backbone.register_forward_pre_hook(lambda *args: seen.append("a"))
    requests = [request(model, 5 + index, max_tokens=12) for index, model in enumerate([*models, "base", "b", "a"])]
    wanted = expected({**models, "base": base}, requests)
    assert seen == []
    served = engine(models, speculation=speculation)
    assert answers(served, requests) == wanted
    assert (seen != []) == (speculation is not None)
    assert len({tuple(answer) for answer in wanted[:3]}) == 3, "the shadows must differ"


def test_models_that_cannot_be_mixed_are_served_side_by_side():
    base = tiny_base()
    models = {
        "a": adapter(base, 1),
        "b": adapter(base, 2, activation="gelu"),
        "c": adapter(base, 3, inject_first=True),
        "d": adapter(base, 4, update_norm=False),
        "e": adapter(base, 5, injection_start=0.5),
    }
    requests = [request(model, 4 + index) for index, model in enumerate([*models, *models, "base"])]
    assert answers(engine(models), requests) == expected({**models, "base": base}, requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_mixed_pass_are_those_of_each_model_alone(dtype):
    base = tiny_base().to(dtype)  # beside shadows in float32
    models = {"a": adapter(base, 1), "b": adapter(base, 2, rank=6)}
    requests = [request(model, 6, max_tokens=1, top_logprobs=5) for model in ("a", "b", "base")]

    async def logprobs(served):
        told = await asyncio.gather(*(ask(served, each) for each in requests))
        return [pieces[-1].tokens[0].top for _, pieces in told]

    for asked, top in zip(requests, with_engine(engine(models), logprobs), strict=True):
        model = models.get(asked.model, base)
        with torch.no_grad():
            true = model(torch.tensor([asked.prompt])).logits[0, -1].float().log_softmax(-1)
        tokens = torch.tensor([token for token, _, _ in top])
        exact = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(torch.tensor([logprob for *_, logprob in top]), true[tokens], **exact)
        if dtype == torch.float32:
            assert tokens.tolist() == true.topk(5).indices.tolist()


def test_requests_that_come_later_join_those_that_run():
    models = one_model()
    late = request(length=7, max_tokens=10)

    async def work(served):
        first = await served.generate(request(length=5, max_tokens=60))
        reading = first.__aiter__()
        early = [await reading.__anext__() for _ in range(3)]
        ids, _ = await ask(served, late)
        rest = [piece async for piece in reading]
        return [token.id for piece in early + rest for token in piece.tokens], ids

    long, short = with_engine(engine(models), work)
    assert long == alone(models["a"], prompt(5), 60)
    assert short == alone(models["a"], prompt(7), 10)


def test_a_base_without_shadows_is_served_too():
    base = tiny_base("qwen3")
    requests = [request("base", 5), request("base", 9)]
    assert answers(engine({}, base), requests) == expected({"base": base}, requests)


def test_what_no_mask_can_keep_apart_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="'qwen3_next' cannot be served in batches"):
        engine(one_model("qwen3_next"))


def test_a_model_with_a_base_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="'a' has a base of its own"):
        engine({"a": perturbed_model()}, tiny_base())


@pytest.mark.parametrize(
    ("settings", "status", "param", "said"),
    [
        ({"model": "b"}, 404, "model", "no model 'b' is served here; there are a, base"),
        ({"prompt": [3] * 128}, 400, "prompt", "128 tokens, and 'a' takes 128"),
        ({"prompt": [3] * 100, "max_tokens": 29}, 400, "max_tokens", "ask for 28 at most"),
        ({"prompt": [3, 97]}, 400, "prompt", "token 97"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_at_once(settings, status, param, said):
    with pytest.raises(RequestError, match=said) as raised:
        answers(engine(one_model()), [request(**settings)])
    assert (raised.value.status, raised.value.param) == (status, param)


def test_a_prompt_at_the_limit_gets_its_one_token():
    models = one_model("opt")  # with learned positions, one more would raise
    requests = [request(length=127, max_tokens=None), request(length=3, max_tokens=125)]
    assert answers(engine(models), requests) == [
        alone(models["a"], prompt(127), 1),
        alone(models["a"], prompt(3), 125),
    ]


def test_requests_beyond_the_queue_are_refused():
    async def work(served):
        running = [await served.generate(request(max_tokens=100)) for _ in range(3)]
        with pytest.raises(RequestError, match="ask again later") as raised:
            await served.generate(request())
        for answer in running:
            await answer.aclose()
        ids, _ = await ask(served, request())
        return raised.value.status, len(ids)

    assert with_engine(engine(one_model(), max_sequences=1, max_queue=2), work) == (429, 12)


def test_a_small_cache_admits_one_sequence_after_the_other():
    models = one_model()
    requests = [request(length=9, max_tokens=11) for _ in range(3)]
    served = engine(models, max_tokens=40, speculation=None)
    assert answers(served, requests) == expected(models, requests)
    assert served.counters()["passes"] >= 2 * 11, "no more than two rows of 20 at once"
    with pytest.raises(RequestError, match="'a' takes 40"):
        answers(engine(models, max_tokens=40), [request(prompt=[3] * 41)])


def test_cancelling_frees_the_slot_and_leaves_the_others_alone():
    models = one_model()

    async def work(served):
        gone = await served.generate(request(length=4, max_tokens=100))
        stays = await served.generate(request(length=6, max_tokens=30))
        async for _ in gone:
            break
        await gone.aclose()
        await gone.aclose()
        assert [piece async for piece in gone] == [] or gone.ended.is_set()
        assert served.counters()["running"] <= 1
        told = [token.id for piece in await pieces_of(stays) for token in piece.tokens]
        return told, served.counters()

    told, counters = with_engine(engine(models), work)
    assert told == alone(models["a"], prompt(6), 30)
    assert (counters["cancelled"], counters["finished"], counters["running"]) == (1, 1, 0)


def test_a_request_that_waits_can_be_cancelled():
    async def work(served):
        runs, waits = await served.generate(request(max_tokens=40)), await served.generate(request())
        await waits.aclose()
        return await pieces_of(waits), len(await pieces_of(runs))

    nothing, some = with_engine(engine(one_model(), max_sequences=1), work)
    assert nothing == []
    assert some > 0


def test_a_pass_that_fails_ends_its_requests_and_nothing_else(monkeypatch):
    run, broken = ModelRunner.run, [True]

    def fail(self, sequences, tokens, known=None):
        if broken and any(each.adapter is None for each in sequences):
            raise RuntimeError("out of memory")
        return run(self, sequences, tokens, known)

    monkeypatch.setattr(ModelRunner, "run", fail)
    models = one_model()

    async def work(served):
        with pytest.raises(RequestError, match=r"failed \(RuntimeError\)") as raised:
            await ask(served, request("base"))
        broken.clear()
        return raised.value.status, await ask_all(served, [request("base"), request()])

    status, told = with_engine(engine(models), work)
    assert status == 500
    assert told == expected({**models, "base": models["a"].base}, [request("base"), request()])


def test_closing_finishes_what_was_begun_and_takes_nothing_more():
    models = one_model()

    async def main():
        served = engine(models, max_sequences=1)
        begun = [await served.generate(request(max_tokens=30)) for _ in range(2)]
        closing = asyncio.create_task(served.aclose())
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="closing") as raised:
            await served.generate(request())
        told = [[token.id for piece in await pieces_of(answer) for token in piece.tokens] for answer in begun]
        await closing
        return raised.value.status, told

    status, told = asyncio.run(main())
    assert status == 503
    assert told == [alone(models["a"], prompt(5), 30)] * 2


def test_closing_breaks_off_what_takes_too_long():
    async def main():
        served = engine(one_model(), close_seconds=0.0)
        begun = await served.generate(request(max_tokens=120))
        await served.aclose()
        with pytest.raises(RequestError, match="closing") as raised:
            await pieces_of(begun)
        return raised.value.status

    assert asyncio.run(main()) == 503


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
def test_models_are_given_back_as_they_were():
    base = tiny_base()
    models = {"a": adapter(base, 1), "b": adapter(base, 2)}

    def fast(model):
        return any(isinstance(vars(layer).get("forward"), PrepackedForward) for layer in model.shadow.modules())

    async def work(served):
        await ask_all(served, [request("a"), request("b")])
        assert all(fast(model) for model in models.values())
        await served.unload("a")
        await ask_all(served, [request("b")])  # the thread has done what it was told before
        return fast(models["a"]), fast(models["b"])

    assert with_engine(engine(models), work) == (False, True)
    assert not any(
        isinstance(vars(layer).get("forward"), PrepackedForward)
        for model in models.values()
        for layer in model.modules()
    )


def test_adapters_come_and_go_while_others_answer(tmp_path):
    base = tiny_base()
    models = {"a": adapter(base, 1), "b": adapter(base, 2, rank=6)}
    models["b"].save_pretrained(tmp_path / "b")

    async def work(served):
        running = await served.generate(request(max_tokens=60))
        await served.load("b", str(tmp_path / "b"))
        second = await served.generate(request("b", max_tokens=30))
        assert [card.name for card in served.models()] == ["a", "b", "base"]
        leaving = asyncio.create_task(served.unload("b"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="no model 'b'"):
            await served.generate(request("b"))
        told = [token.id for piece in await pieces_of(second) for token in piece.tokens]
        await leaving
        with pytest.raises(RequestError, match="no model 'b'"):
            await served.unload("b")
        return told, [token.id for piece in await pieces_of(running) for token in piece.tokens]

    second, first = with_engine(engine({"a": models["a"]}), work)
    assert second == alone(models["b"], prompt(5), 30)
    assert first == alone(models["a"], prompt(5), 60)


def test_adapters_that_do_not_load_are_refused_and_the_engine_keeps_running(tmp_path):
    perturbed_model(seed=3).save_pretrained(tmp_path / "same")  # of an equal base: loads beside ours
    adapter(tiny_base(seed=7)).save_pretrained(tmp_path / "foreign")

    async def work(served):
        for name, path, said in (
            ("a", "same", "the name 'a' is taken"),
            ("base", "same", "the name 'base' is taken"),
            ("b", "foreign", "base"),
            ("b", "nothing", "nothing"),
        ):
            with pytest.raises(RequestError, match=said) as raised:
                await served.load(name, str(tmp_path / path))
            assert raised.value.status == 400
        await served.load("b", str(tmp_path / "same"))
        return await ask(served, request("b"))

    ids, _ = with_engine(engine(one_model()), work)
    assert ids == alone(perturbed_model(seed=3), prompt(5))


def test_the_caller_chooses_how_paths_are_opened():
    models = one_model()
    opened = []

    def open_adapter(path):
        opened.append(path)
        return adapter(models["a"].base, 2), PromptFormat()

    async def work(served):
        await served.load("b", "somewhere")
        return await ask(served, request("b"))

    ids, _ = with_engine(engine(models, open_adapter=open_adapter), work)
    assert opened == ["somewhere"]
    assert ids == alone(adapter(tiny_base(), 2), prompt(5))


def test_messages_go_through_the_models_own_format():
    models = one_model()
    served = engine(models)
    served._adapters["a"].prompt_format = PromptFormat("say {word}", chat_template=False)
    messages = [{"role": "user", "content": "tea"}]
    ids = served._processor.validator.tokenizer("say tea")["input_ids"]
    assert answers(served, [request(prompt=None, messages=messages)]) == [alone(models["a"], ids)]


def test_counters_report_the_work_done():
    served = engine(one_model(), speculation=SpeculationConfig(length=2, drafter="shadow"))
    answers(served, [request(length=5), request(length=6)])
    numbers = served.counters()
    assert (numbers["finished"], numbers["prompt_tokens"], numbers["completion_tokens"]) == (2, 11, 24)
    assert (numbers["running"], numbers["waiting"], numbers["failed"]) == (0, 0, 0)
    assert numbers["verified_draft_tokens"] > 0
    assert numbers["tokens_per_pass"] == 24 / numbers["passes"]
