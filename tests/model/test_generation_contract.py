"""What transformers promises of every model that generates, asked of ours in both modes.

transformers tests this with ``GenerationTesterMixin``, which is in no sdist, so it cannot be run here. These are checks
of the same promises, written for two networks; ``test_generation.py`` compares cached with uncached decoding.
"""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from shadowtune.compatibility import CACHE, cache_of
from tests.support.bases import BLOCKS, VOCABULARY, WIDTH
from tests.support.shadows import perturbed_model, tokens

NEW = 5
CASES = [(kind, mode) for kind in ("llama", "qwen3", "gemma3_text") for mode in ("attached", "detached")]
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def model(request):
    kind, mode = request.param
    model = perturbed_model(kind, init_layers=(0,)).set_mode(mode)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)  # no end: all answers have full length
    return model


def blocks_of(model):
    return BLOCKS if model.mode == "attached" else 1


def generate(model, ids=None, **settings):
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=NEW, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_have_the_promised_shape_with_and_without_records(model, way):
    ids = tokens(2, 6)
    plain = generate(model, ids, **WAYS[way])
    records = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    model.set_attn_implementation("eager")
    recorded = generate(model, ids, return_dict_in_generate=True, **records, **WAYS[way])
    rows = 2 * WAYS[way].get("num_return_sequences", 1)
    inner = 2 * max(WAYS[way].get("num_beams", 1), WAYS[way].get("num_return_sequences", 1))
    beams = WAYS[way].get("num_beams", 1) > 1
    assert plain.shape == recorded.sequences.shape == (rows, 6 + NEW)
    assert isinstance(recorded, GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)
    assert len(recorded.scores) == len(recorded.logits) == NEW
    assert all(step.shape == (inner, VOCABULARY) for step in (*recorded.scores, *recorded.logits))
    assert len(recorded.hidden_states) == len(recorded.attentions) == NEW
    for number, (states, weights) in enumerate(zip(recorded.hidden_states, recorded.attentions, strict=True)):
        length = 6 if number == 0 else 1
        assert len(states) == blocks_of(model) + 1
        assert len(weights) == blocks_of(model)
        assert all(state.shape == (inner if number else states[0].shape[0], length, WIDTH) for state in states)
        assert all(weight.shape[-2:] == (length, 6 + number) for weight in weights)


def test_greedy_choices_are_the_largest_recorded_logits(model):
    recorded = generate(model, tokens(2, 6), do_sample=False, return_dict_in_generate=True, output_logits=True)
    chosen = torch.stack([step.argmax(-1) for step in recorded.logits], 1)
    assert torch.equal(recorded.sequences[:, 6:], chosen)
    full = model(recorded.sequences[:, :-1]).logits[:, 5:]
    torch.testing.assert_close(torch.stack(recorded.logits, 1), full.float(), rtol=1e-4, atol=1e-4)


def test_embeddings_generate_what_their_tokens_do(model):
    ids = tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    for use_cache in (True, False):
        settings = {"do_sample": False, "use_cache": use_cache}
        from_embeds = generate(model, inputs_embeds=embeds, **settings)
        assert torch.equal(from_embeds, generate(model, ids, **settings)[:, 6:])
        assert torch.equal(generate(model, ids, inputs_embeds=embeds, **settings)[:, 6:], from_embeds)


def test_an_answer_continues_from_its_own_cache(model):
    ids = tokens(1, 6)
    whole = model.generate(ids, max_new_tokens=2 * NEW, do_sample=False)
    first = generate(model, ids, do_sample=False, return_dict_in_generate=True)
    again = generate(model, first.sequences, do_sample=False, **{CACHE: cache_of(first)})
    assert torch.equal(again, whole)


def test_nothing_but_a_begin_token_is_needed(model):
    assert torch.equal(generate(model, do_sample=False), generate(model, torch.tensor([[1]]), do_sample=False))


def test_the_caller_s_cache_has_a_layer_for_each_block_of_both_networks(model):
    cache = DynamicCache(config=model.config)
    generate(model, tokens(2, 6), do_sample=False, **{CACHE: cache})
    assert len(cache) == BLOCKS + 1
    held = [layer for layer in cache.layers if layer.is_initialized]
    assert len(held) == (BLOCKS + 1 if model.mode == "attached" else 1)
    assert all(layer.get_seq_length() == 6 + NEW - 1 for layer in held)
    assert cache.layers[0].keys.shape[0] == 2


def test_left_padding_changes_nothing(model):
    ids = tokens(1, 6)
    padded, mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1), torch.ones(1, 10, dtype=torch.long)
    mask[:, :4] = 0
    alone = generate(model, ids, do_sample=False)[:, 6:]
    assert torch.equal(generate(model, padded, attention_mask=mask, do_sample=False)[:, 10:], alone)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_every_kind_of_cache_gives_the_same_answer(model, implementation):
    ids = tokens(2, 6)
    other = generate(model, ids, do_sample=False, cache_implementation=implementation)
    assert torch.equal(other, generate(model, ids, do_sample=False))


def test_answers_end_at_the_end_token_and_are_padded(model):
    ids = tokens(2, 6)
    answers = generate(model, ids, do_sample=False)[:, 6:]
    end = int(answers[0, 1])
    ended = generate(model, ids, do_sample=False, eos_token_id=end)[:, 6:]
    for answer, short in zip(answers.tolist(), ended.tolist(), strict=True):
        kept = answer[: answer.index(end) + 1] if end in answer else answer
        assert short[: len(kept)] == kept
        assert set(short[len(kept) :]) <= {0}
