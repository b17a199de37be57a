"""Decoding is exact: with a cache as without, in a batch as alone, in pieces as in one go."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, MinLengthLogitsProcessor, StaticCache, TextStreamer
from transformers.cache_utils import QuantizedCache

from shadowtune import attach
from shadowtune.compatibility import CACHE, cache_of
from shadowtune.errors import AttachError
from tests.support.bases import tiny_base
from tests.support.shadows import perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer

MODES = ("attached", "detached")
NEW = 14  # with the prompt, more tokens than the sliding windows of the tiny bases hold
CHOICES = {
    "greedy": {"do_sample": False},
    "two_beams": {"do_sample": False, "num_beams": 2},
    "four_beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "sampled_beams": {"do_sample": True, "num_beams": 3},
    "penalized": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


def endless(model):
    """Let a model generate as many tokens as it is asked for."""
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def models():
    """A model of each kind of attention: full, sliding, mixed, learned positions, hybrid with linear attention."""
    narrow = {"hidden_size": 16, "num_shadow_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"llama": narrow}
    kinds = ("llama", "mistral", "gemma2", "opt", "gpt_oss", "qwen3_next")
    made = {kind: endless(perturbed_model(kind, **settings.get(kind, {}))) for kind in kinds}
    for name, mixing in (("stateless", None), ("stateless_mixed", 0.5)):
        made[name] = endless(perturbed_model("llama", **narrow, **STATELESS, logit_interpolation=mixing))
    made["stateless_gemma2"] = endless(perturbed_model("gemma2", **STATELESS))
    return made


STATELESS = {"variant": "stateless", "alpha": 0.003}
KINDS = ["llama", "mistral", "gemma2", "opt", "gpt_oss", "qwen3_next"]


@pytest.fixture(params=[*KINDS, "stateless", "stateless_mixed", "stateless_gemma2"])
def model(request, models):
    return models[request.param].set_mode("attached")


@pytest.fixture
def llama(models):
    return models["llama"].set_mode("attached")


def generate(model, ids, **settings):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **settings})


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def backbone_passes(model):
    """A list that grows with each pass of the shadow's backbone, and the handle that ends it."""
    passes = []
    return passes, model.shadow.backbone.register_forward_pre_hook(lambda *args: passes.append(1))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_stateless_shadow_decodes_without_its_backbone(models, choice):
    model = models["stateless"].set_mode("attached")
    passes, handle = backbone_passes(model)
    ids = tokens(2, 9)
    cached = generate(model, ids, **CHOICES[choice])
    assert torch.equal(cached, generate(model, ids, use_cache=False, **CHOICES[choice]))
    handle.remove()
    assert passes == []
    assert not torch.equal(cached, generate(model.set_mode("base"), ids, **CHOICES[choice])[: len(cached)])


@pytest.mark.parametrize("name", ["stateless_mixed", "llama"])
def test_a_shadow_that_is_read_runs_its_backbone(models, name):
    model = models[name].set_mode("attached")
    passes, handle = backbone_passes(model)
    generate(model, tokens(2, 9))
    handle.remove()
    assert len(passes) == NEW


@torch.no_grad()
def test_where_drafts_began_the_backbone_keeps_up_with_the_cache(models):
    model, ids = models["stateless"].set_mode("attached"), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache, use_cache=True, run_shadow=True)
    model(ids[:, 9:], past_key_values=cache, use_cache=True)
    states = model.set_mode("detached")(ids[:, :1], past_key_values=cache, use_cache=True).logits
    close(states[:, 0], logits(model, torch.cat([ids, ids[:, :1]], 1))[:, -1])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_tokens_that_the_backbone_has_not_seen_are_not_taken_for_seen(models, kind):
    model, ids = models["stateless"].set_mode("attached"), tokens(1, 9)
    cache = kind(config=model.config, **({} if kind is DynamicCache else {"max_cache_len": 20}))
    model(ids, past_key_values=cache, use_cache=True)
    assert int(cache.get_seq_length()) == 9
    with pytest.raises(AttachError, match="9 tokens that the shadow's backbone has not seen"):
        model.set_mode("detached")(ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(AttachError, match="has not seen"):
        model.run_backbone(ids[:, :1], None, torch.tensor([[9]]), cache)


@torch.no_grad()
def test_an_attached_base_runs_without_the_backbone_too(models):
    model, ids = models["stateless"].set_mode("attached"), tokens(1, 20)
    expected = logits(model, ids)
    passes, handle = backbone_passes(model)
    with attach(model.base, model.shadow):
        cache = cache_of(model.base(ids[:, :9], use_cache=True))
        continued = model.base(ids[:, 9:], use_cache=True, **{CACHE: cache}).logits
    handle.remove()
    assert passes == []
    close(continued, expected[:, 9:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choice", CHOICES)
def test_cached_equals_uncached(llama, mode, choice):
    ids = tokens(2, 9)
    cached = generate(llama.set_mode(mode), ids, **CHOICES[choice])
    assert torch.equal(cached, generate(llama, ids, use_cache=False, **CHOICES[choice]))
    assert cached.shape[1] == 9 + NEW


@pytest.mark.parametrize("choice", ["greedy", "four_beams"])
def test_cached_equals_uncached_in_every_kind_of_attention(model, choice):
    ids = tokens(2, 9)
    cached = generate(model, ids, **CHOICES[choice])
    assert torch.equal(cached, generate(model, ids, use_cache=False, **CHOICES[choice]))


def test_beam_search_would_notice_a_cache_that_is_not_reordered(llama, monkeypatch):
    uncached = generate(llama, tokens(2, 9), num_beams=4, use_cache=False)
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda *args: None)
    assert not torch.equal(generate(llama, tokens(2, 9), num_beams=4), uncached)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_every_kind_of_cache_gives_the_same_tokens(model, implementation, mode):
    ids = tokens(2, 9)
    expected = generate(model.set_mode(mode), ids, use_cache=False)
    assert torch.equal(generate(model, ids, cache_implementation=implementation), expected)


@pytest.mark.parametrize("choice", ["two_beams", "sampled"])
def test_a_static_cache_serves_beams_and_samples(llama, choice):
    expected = generate(llama, tokens(2, 9), **CHOICES[choice])
    assert torch.equal(generate(llama, tokens(2, 9), cache_implementation="static", **CHOICES[choice]), expected)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_prefill_in_chunks_gives_the_same_tokens(llama, implementation):
    settings = {"cache_implementation": implementation, "prefill_chunk_size": 4, "disable_compile": True}
    assert torch.equal(generate(llama, tokens(2, 9), **settings), generate(llama, tokens(2, 9)))


@torch.no_grad()
def test_a_quantized_cache_stays_near(llama):
    ids = tokens(2, 9)
    exact, cache = logits(llama, ids), QuantizedCache("fp8", config=llama.config)
    llama(ids[:, :8], past_key_values=cache, use_cache=True)
    near = llama(ids[:, 8:], past_key_values=cache, use_cache=True).logits[:, 0]
    assert not torch.equal(near, exact[:, 8])
    assert (near - exact[:, 8]).abs().max() < 0.3 * exact.std()
    assert [layer.get_seq_length() for layer in cache.layers] == [9] * 6
    quantized = generate(llama, ids, cache_implementation="quantized", cache_config={"backend": "fp8"})
    assert quantized.shape == (2, 9 + NEW)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [[20], [7, 13], [1] * 20, [19, 1], [1, 19]], ids=str)
@torch.no_grad()
def test_prefill_in_one_go_in_chunks_and_token_by_token(model, pieces, mode):
    ids, cache, parts = tokens(2, 20), DynamicCache(config=model.config), []
    for part in ids.split(pieces, 1):
        output = model.set_mode(mode)(part, past_key_values=cache, use_cache=True)
        assert cache_of(output) is cache
        parts.append(output.logits)
        assert cache.get_seq_length() == sum(part.shape[1] for part in parts)
    close(torch.cat(parts, 1), logits(model, ids))


@torch.no_grad()
def test_a_static_cache_takes_the_prompt_in_pieces(model):
    ids, cache = tokens(2, 20), StaticCache(config=model.config, max_cache_len=24)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([7, 1, 12], 1)]
    close(torch.cat(parts, 1), logits(model, ids))


def test_a_conversation_goes_on_with_its_cache(llama):
    cache = DynamicCache(config=llama.config)
    first = generate(llama, tokens(1, 9), **{CACHE: cache})
    again = torch.cat([first, tokens(1, 5, seed=8)], 1)
    mask = torch.ones_like(again)  # else transformers takes a generated 0 for padding
    continued = generate(llama, again, attention_mask=mask, **{CACHE: cache})
    assert torch.equal(continued, generate(llama, again, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("lazy", [True, False])
def test_a_cache_made_without_a_config_or_for_the_base_is_completed(llama, lazy):
    cache = DynamicCache() if lazy else DynamicCache(config=llama.base.config)
    assert torch.equal(generate(llama, tokens(1, 9), **{CACHE: cache}), generate(llama, tokens(1, 9)))
    assert len(cache) == 6


@torch.no_grad()
def test_a_cropped_copied_or_selected_cache_goes_on(llama):
    ids, cache = tokens(3, 20), DynamicCache(config=llama.config)
    llama(ids[:, :15], past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)
    cropped = copy.deepcopy(cache)
    cropped.crop(-5)
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([2, 0]))
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    expected = logits(llama, ids)
    for which, rows, start in (
        (copied, [0, 1, 2], 15),
        (cropped, [0, 1, 2], 10),
        (selected, [2, 0], 15),
        (repeated, [0, 0, 1, 1, 2, 2], 15),
        (cache, [0, 1, 2], 15),
    ):
        output = llama(ids[rows, start:], past_key_values=which, use_cache=True)
        close(output.logits, expected[rows, start:])


def test_a_cache_of_another_model_is_refused(llama, models):
    foreign = DynamicCache(config=models["opt"].config)
    generate(models["opt"].set_mode("attached"), tokens(1, 9), **{CACHE: foreign})
    plain = DynamicCache(config=llama.base.config)
    llama.base.generate(tokens(1, 9), **{CACHE: plain}, max_new_tokens=2)
    for cache in (foreign, plain):
        with pytest.raises(AttachError, match="this model needs 2 for the shadow and 4 for the base"):
            llama(tokens(1, 1), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_cache_filled_detached_serves_detached_calls_only(llama):
    cache = DynamicCache(config=llama.config)
    llama.set_mode("detached")(tokens(1, 9), past_key_values=cache, use_cache=True)
    llama(tokens(1, 1), past_key_values=cache, use_cache=True)
    with pytest.raises(AttachError, match="filled in mode 'detached'"):
        llama.set_mode("attached")(tokens(1, 1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_cache_that_the_shadow_filled_does_not_serve_the_bare_base(llama, mode):
    cache, ids = DynamicCache(config=llama.config), tokens(1, 9)
    llama.set_mode(mode)(ids, past_key_values=cache, use_cache=True)
    with llama.disable_adapter():
        with pytest.raises(AttachError, match="start mode 'base' with a new cache"):
            llama(ids[:, :1], past_key_values=cache, use_cache=True)
        with pytest.raises(AttachError, match="start mode 'base' with a new cache"):
            llama.generate(tokens(1, 10), **{CACHE: cache}, max_new_tokens=2)


@torch.no_grad()
def test_the_bare_base_uses_its_part_of_a_cache_for_both(llama):
    cache, ids = DynamicCache(config=llama.config), tokens(1, 9)
    with llama.disable_adapter():
        expected = llama(ids, use_cache=False).logits[:, -1:]
        llama(ids[:, :8], past_key_values=cache, use_cache=True)
        found = llama(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(AttachError):
        llama.set_mode("attached")(ids[:, :1], past_key_values=cache, use_cache=True)


def padded(rows, side, length):
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


ROWS = [tokens(1, length, seed=length)[0] for length in (3, 11, 7)]


@pytest.mark.parametrize("mode", MODES)
def test_a_left_padded_batch_generates_what_each_row_does_alone(model, mode):
    ids, mask = padded(ROWS, "left", 11)
    together = generate(model.set_mode(mode), ids, attention_mask=mask)
    for row, prompt in zip(together, ROWS, strict=True):
        assert torch.equal(row[11:], generate(model, prompt[None])[0, len(prompt) :])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_logits_alone(model, side, mode):
    ids, mask = padded(ROWS, side, 13)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model.set_mode(mode), ids, attention_mask=mask, position_ids=positions)
    for index, prompt in enumerate(ROWS):
        close(together[index][mask[index].bool()], logits(model, prompt[None])[0])


def test_batches_with_padding_continue_from_a_cache(llama):
    ids, mask = padded(ROWS, "left", 11)
    cached = generate(llama, ids, attention_mask=mask)
    assert torch.equal(cached, generate(llama, ids, attention_mask=mask, use_cache=False))


def test_prompts_as_embeddings_and_as_a_positional_argument(llama):
    ids = tokens(2, 9)
    expected = generate(llama, ids)
    embeds = llama.get_input_embeddings()(ids)
    torch.manual_seed(3)
    generated = llama.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generated, expected[:, 9:])
    close(llama(inputs_embeds=embeds, use_cache=False).logits, logits(llama, ids))
    close(llama(ids).logits, llama(input_ids=ids).logits)


def test_a_prompt_of_one_token(model):
    assert torch.equal(generate(model, tokens(2, 1)), generate(model, tokens(2, 1), use_cache=False))


@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_a_prompt_at_the_context_limit_and_one_beyond_behave_as_in_the_base(models, kind):
    model = models[kind].set_mode("attached")
    assert model(tokens(1, 128)).logits.shape == (1, 128, 97)
    beyond = tokens(1, 129)
    if kind == "llama":  # rotary positions go on; the base says nothing either
        assert model.base(beyond).logits.shape == model(beyond).logits.shape
    else:
        for network in (model.base, model):
            with pytest.raises(IndexError):
                network(beyond)


@pytest.mark.parametrize("role", ["target", "assistant", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_assisted_decoding_changes_nothing_but_the_speed(llama, role, mode):
    plain = endless(tiny_base(seed=4))
    target = plain if role == "assistant" else llama.set_mode(mode)
    assistant = plain if role == "target" else llama.set_mode(mode)
    if role == "both":
        assistant = endless(perturbed_model(seed=9)).set_mode(mode)
    expected = generate(target, tokens(1, 9))
    assert torch.equal(generate(target, tokens(1, 9), assistant_model=assistant), expected)


def test_a_shadow_assists_its_own_base(llama):
    twin = copy.deepcopy(llama).set_mode("detached")
    expected = generate(llama, tokens(1, 9))
    assert torch.equal(generate(llama, tokens(1, 9), assistant_model=twin), expected)


def test_prompt_lookup_changes_nothing(llama):
    ids = tokens(1, 5).repeat(1, 3)
    assert torch.equal(generate(llama, ids, prompt_lookup_num_tokens=3), generate(llama, ids))


def test_streaming_stop_strings_and_logits_processors(llama, capsys):
    tokenizer, ids = tiny_tokenizer(), tokens(1, 9)
    expected = generate(llama, ids)
    generate(llama, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0, 9:]).strip()
    stop = tokenizer.decode(expected[0, 12])
    stopped = generate(llama, ids, stop_strings=[stop], tokenizer=tokenizer)
    assert 9 < stopped.shape[1] <= 13
    assert torch.equal(stopped, expected[:, : stopped.shape[1]])
    banned = int(expected[0, 9])
    changed = generate(llama, ids, bad_words_ids=[[banned]])
    assert banned not in changed[0, 9:]
    processors = LogitsProcessorList([MinLengthLogitsProcessor(25, expected[0, 10].item())])
    assert expected[0, 10] not in generate(llama, ids, logits_processor=processors)[0, 9:]


def test_base_mode_generates_what_the_base_does(llama):
    expected = endless(copy.deepcopy(llama.base)).generate(tokens(2, 9), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(llama.set_mode("base"), tokens(2, 9)), expected)
    assert not torch.equal(generate(llama.set_mode("attached"), tokens(2, 9)), expected)


def test_generating_needs_no_gradient_and_keeps_none(llama):
    output = llama.generate(tokens(1, 9), max_new_tokens=2, output_scores=True, return_dict_in_generate=True)
    assert not output.scores[0].requires_grad
    assert cache_of(output).get_seq_length() == 10
