"""Activated adapters: a prompt that all adapters share runs as in the bare base (``shadow.injection_after``)."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.compatibility import cache_of
from shadowtune.core import reference
from shadowtune.core.shared_prompt import shared_prompt_length
from shadowtune.errors import AttachError, ConfigError
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, perturbed_classifier, perturbed_model, tokens

MARKER = (11, 7)
VARIANTS = {
    "paper": {},
    "stateless": {"variant": "stateless", "alpha": 0.05},
    "upper_half": {"injection_start": 0.5},
    "interpolated": {"logit_interpolation": 0.5},
}


def marked(rows=3, length=12, ends=(5, 2, 0)):
    """Token ids in which the shared prompt of row i has ``ends[i]`` tokens, 0 for none."""
    ids = tokens(rows, length)
    ids[(ids == MARKER[0]) | (ids == MARKER[1])] = 3
    for row, end in enumerate(ends):
        if end:
            ids[row, end - 2 : end] = torch.tensor(MARKER)
    return ids


@pytest.mark.parametrize("variant", ["paper", "stateless", "upper_half"])
def test_logits_loss_and_every_gradient_equal_the_reference(variant):
    config = ShadowConfig(
        **{"rank": 4, "update_width": 3, "alpha": 0.7, "injection_after": MARKER, **VARIANTS[variant]}
    )
    torch.manual_seed(0)
    model = perturb(ShadowForCausalLM.from_base(tiny_base().double(), config, dtype=torch.float64)).eval()
    ids, labels = marked(), tokens(3, 12, seed=1)
    base, shadow = model.base.model, model.shadow
    embedded = base.embed_tokens(ids)
    initial = shadow.begin(ids, embedded, run_shadow=True).initial
    positions = torch.arange(12).unsqueeze(0)
    call = {"position_embeddings": base.rotary_emb(embedded, positions), "attention_mask": None}
    blocks = [lambda h, block=block: block(h, **call) for block in base.layers]
    p = {**dict(shadow.boundaries.named_parameters()), **dict(shadow.boundaries.named_buffers())}
    expected = model.base.lm_head(base.norm(reference.stack(blocks, embedded, initial, p, config, shared=[5, 2, 0])))
    whole = model.base.lm_head(base.norm(reference.stack(blocks, embedded, initial, p, config)))
    assert (expected - whole).abs().max() > 1e-3, "the marker changes something"
    slow = reference.cross_entropy(expected, labels) + 0.05 * reference.cross_entropy(
        model.base.lm_head(initial), labels
    )

    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss, slow, rtol=1e-10, atol=1e-10)
    explicit = model(ids, injection_from=torch.tensor([5, 2, 0]))
    torch.testing.assert_close(explicit.logits, expected, rtol=1e-10, atol=1e-10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, truth in zip(torch.autograd.grad(output.loss, trained), torch.autograd.grad(slow, trained), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_values_of_the_shared_prompt_are_the_bases_in_every_block(variant):
    model, ids = perturbed_model(injection_after=MARKER, **VARIANTS[variant]), marked()
    blocks = len(model.architecture.blocks_of(model.base))
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        plain = model.base(ids, use_cache=True)
        shared = model(ids).logits[0, :5]
    torch.testing.assert_close(shared, plain.logits[0, :5])
    for ours, bases in zip(cache.layers[-blocks:], cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys[0, :, :5], bases.keys[0, :, :5])
        torch.testing.assert_close(ours.values[0, :, :5], bases.values[0, :, :5])
    top = cache.layers[-1].keys[0, :, 5:] - cache_of(plain).layers[-1].keys[0, :, 5:]
    assert top.abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", [1, 4, 5, 8])
def test_a_call_in_two_parts_equals_one(variant, split):
    model, ids = perturbed_model(injection_after=MARKER, **VARIANTS[variant]), marked()
    starts, mask = torch.tensor([3, 2, 0]), torch.ones_like(ids)
    mask[0, :2] = 0  # left padding: the shared prompt has two tokens less
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache = DynamicCache(config=model.config)
        call = {"past_key_values": cache, "use_cache": True, "injection_from": starts}
        first = model(ids[:, :split], attention_mask=mask[:, :split], **call).logits
        second = model(ids[:, split:], attention_mask=mask, **call).logits
    parts = torch.cat([first, second], 1)
    torch.testing.assert_close(parts[0, 2:], whole[0, 2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[1:], whole[1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def greedy(model, ids, mask, new):
    """Greedy decoding of one sequence by whole calls, without a cache."""
    ids = ids[mask.bool()].unsqueeze(0)
    starts = torch.tensor([shared_prompt_length(ids[0].tolist(), MARKER)])
    for _ in range(new):
        ids = torch.cat([ids, model(ids, injection_from=starts).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -new:].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"speculate": 3}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 4}],
    ids=["plain", "drafts", "static", "chunks"],
)
def test_generation_equals_whole_calls(variant, settings):
    model, ids = perturbed_model(injection_after=MARKER, **VARIANTS[variant]), marked()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=mask, **plain, **settings)[:, 12:]
    assert output.tolist() == [greedy(model, ids[row], mask[row], 8) for row in range(3)]


def test_beams_keep_the_shared_prompt_of_their_sequence():
    model, ids = perturbed_model(injection_after=MARKER), marked()
    plain = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **plain)
    alone = [model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 12), **plain)[0] for row in range(3)]
    assert torch.equal(together, torch.stack(alone))


def test_packed_sequences_equal_padded_ones():
    model, ids = perturbed_model(injection_after=MARKER), marked()
    packed = ids.reshape(1, -1)
    positions = torch.arange(12).repeat(3).unsqueeze(0)
    with torch.no_grad():
        logits = model(packed, position_ids=positions, use_cache=False).logits.view(3, 12, -1)
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_attach_and_classifiers_have_it_too():
    model, ids = perturbed_model(injection_after=MARKER), marked()
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model.base, model.shadow):
            torch.testing.assert_close(model.base(ids).logits, expected)
        classifier = perturbed_classifier(injection_after=MARKER)
        whole = perturbed_classifier()
        assert not torch.allclose(classifier(ids).logits[:2], whole(ids).logits[:2])
        torch.testing.assert_close(classifier(ids).logits[2], whole(ids).logits[2])


def test_it_is_saved_with_the_shadow(tmp_path):
    model, ids = perturbed_model(injection_after=MARKER), marked()
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert loaded.shadow.config.injection_after == MARKER
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_mistakes_are_errors():
    with pytest.raises(ConfigError, match="injection_after must be one or more token ids, got"):
        ShadowConfig(injection_after=())
    with pytest.raises(ConfigError, match="has token 97, but the base's vocabulary ends at 96"):
        perturbed_model(injection_after=(5, 97))
    model, ids = perturbed_model(injection_after=MARKER), marked()
    embeds = model.base.get_input_embeddings()(ids)
    with pytest.raises(AttachError, match="pass injection_from"):
        model(inputs_embeds=embeds)
    with torch.no_grad():
        given = model(inputs_embeds=embeds, injection_from=torch.tensor([5, 2, 0])).logits
        torch.testing.assert_close(given, model(ids).logits)
    with pytest.raises(ConfigError, match="beyond the prompt of 12 tokens"):
        model.generate(ids, injection_from=torch.tensor([13, 0, 0]), max_new_tokens=2)
    with pytest.raises(ConfigError, match="injection_after"):
        model.shadow.config.to_peft()


def test_a_static_cache_made_by_hand():
    model, ids = perturbed_model(injection_after=MARKER), marked()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :8], past_key_values=cache, use_cache=True).logits
        rest = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=1e-4, atol=1e-5)
