"""The prefix cache: what the base computed of a shared prompt is reused by every adapter, and changes no answer."""

import pytest
import torch

from shadowtune.serving.engine.prefix_cache import MIN_TOKENS, PrefixCache, common_length
from tests.serving.engine.support import adapter, alone, answers, ask, engine, prompt, request, with_engine
from tests.support.bases import tiny_base

MARKER = (5, 6)


def layers(tokens, blocks=2):
    """Keys that name their token, values that are twice as large."""
    keys = torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 3)
    return [(keys + block, 2 * keys) for block in range(blocks)]


def shared(length=30):
    return [7 if token in MARKER else token for token in prompt(length, 1)] + list(MARKER)


def question(seed, length=5):
    return shared() + prompt(length, seed)


def adapters(base, count=3, **settings):
    return {f"m{seed}": adapter(base, seed, injection_after=MARKER, **settings) for seed in range(1, count + 1)}


def test_the_longest_known_beginning_is_found():
    cache, text = PrefixCache(100), list(range(3, 43))
    assert cache.find(text) == (0, [])
    cache.add(text[:20], layers(text[:20]))
    cache.add(text[:10] + [0] * 15, layers(text[:10] + [0] * 15))
    length, found = cache.find([*text, 1])
    assert (length, found[1][0][0, 0, :, 0].tolist()) == (20, [token + 1 for token in text[:20]])
    assert cache.find(text[: MIN_TOKENS - 1])[0] == 0
    assert common_length([1, 2, 3], [1, 2]) == 2


def test_the_least_recently_used_one_is_dropped_and_a_longer_one_replaces_its_beginning():
    cache, texts = PrefixCache(70), [[index] * 30 for index in range(3)]
    for text in texts[:2]:
        cache.add(text, layers(text))
    assert not cache.keeps(texts[0])
    cache.find(texts[0])
    cache.add(texts[2], layers(texts[2]))
    assert [cache.find(text)[0] for text in texts] == [30, 0, 30]
    longer = [0] * 40
    assert cache.keeps(longer)
    cache.add(longer, layers(longer))
    assert (cache.tokens, cache.find(longer)[0]) == (70, 40)
    assert not PrefixCache(0).keeps(longer)


@pytest.mark.parametrize(
    ("settings", "speculate"),
    [({}, True), ({"variant": "stateless", "alpha": 0.02}, False), ({"logit_interpolation": 0.5}, False)],
    ids=["paper", "stateless", "interpolated"],
)
def test_answers_are_those_of_each_model_alone(settings, speculate):
    base = tiny_base()
    models = adapters(base, **settings)
    requests = [
        request(name, prompt=question(seed), speculate=speculate) for seed, name in enumerate([*models, *models])
    ]
    expected = [alone(models[each.model], each.prompt) for each in requests]
    served = engine(models, prefill_tokens=16)
    assert answers(served, requests) == expected
    numbers = served.counters()
    assert numbers["cached_prompt_tokens"] == 5 * 32, "one sequence computed it, the others waited and reused it"
    assert numbers["prompt_tokens"] == 6 * 37
    whole = engine(models, prefill_tokens=16, prefix_tokens=0)
    assert answers(whole, requests) == expected
    assert whole.counters()["cached_prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("llama", {"variant": "stateless", "alpha": 0.02}), ("qwen2", {})],
    ids=["paper", "stateless", "qwen2"],
)
def test_lower_blocks_run_once_for_a_prompt_of_all_adapters(model_type, settings):
    base = tiny_base(model_type)
    models = {f"m{seed}": adapter(base, seed, injection_start=0.5, **settings) for seed in range(1, 4)}
    models["marked"] = adapter(base, 7, injection_start=0.5, injection_after=MARKER, **settings)
    requests = [request(name, prompt=question(seed)) for seed, name in enumerate(models)]
    expected = [alone(models[each.model], each.prompt) for each in requests]
    served = engine(models, prefill_tokens=16)
    ran = []
    blocks = base.model.layers
    for block in (blocks[1], blocks[2]):
        block.register_forward_pre_hook(lambda module, args: ran.append((module, args[0].shape[:2].numel())))
    assert answers(served, requests) == expected
    numbers = served.counters()
    assert (numbers["lower_cached_prompt_tokens"], numbers["prompt_tokens"]) == (3 * 32, 4 * 37)
    lower, upper = (sum(count for module, count in ran if module is block) for block in (blocks[1], blocks[2]))
    assert upper >= lower + 3 * 32


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_bases_whose_lower_blocks_cannot_be_left_out_compute_them(model_type):
    base = tiny_base(model_type)
    models = {f"m{seed}": adapter(base, seed, injection_start=0.5) for seed in range(1, 3)}
    requests = [request(name, prompt=question(seed)) for seed, name in enumerate(models)]
    served = engine(models)
    assert answers(served, requests) == [alone(models[each.model], each.prompt) for each in requests]
    assert served.counters()["lower_cached_prompt_tokens"] == 0


def test_the_base_and_adapters_that_inject_everywhere_are_served_beside_them():
    base = tiny_base()
    models = {**adapters(base, 2), "plain": adapter(base, 9)}
    names = ["m1", "base", "plain", "m2", "base", "plain"]
    requests = [request(name, prompt=question(seed)) for seed, name in enumerate(names)]
    expected = [alone(models.get(each.model, base), each.prompt) for each in requests]
    served = engine(models)
    assert answers(served, requests) == expected
    assert served.counters()["cached_prompt_tokens"] >= 2 * 32


def test_a_prompt_that_was_answered_before_and_one_that_leaves_the_shared_part_early():
    base = tiny_base()
    models = adapters(base, 2)
    other = shared()[:20] + prompt(14, 8) + list(MARKER) + prompt(4, 3)
    requests = [request("m1", prompt=question(3)), request("m2", prompt=question(3)), request("m2", prompt=other)]

    async def one_after_another(served):
        told = [await ask(served, each) for each in requests]
        return [ids for ids, _ in told], served.counters()["cached_prompt_tokens"]

    ids, reused = with_engine(engine(models), one_after_another)
    assert ids == [alone(models[each.model], each.prompt) for each in requests]
    assert reused == 32 + 20
