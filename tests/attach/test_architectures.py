import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.attach import ARCHITECTURES, Architecture, architecture_of
from shadowtune.errors import UnsupportedArchitectureError
from tests.support.bases import CONFIGS, fill, tiny_base, tiny_config
from tests.support.shadows import perturbed_model, tokens

NEEDLESS = {"k_proj.bias"}  # of OPT: softmax does not see what is added to every key, so its gradient is rounding noise


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return perturbed_model(kind)


def test_every_row_has_a_tiny_config_here_and_the_other_way_round():
    assert set(CONFIGS) == set(ARCHITECTURES)


def test_at_the_start_attached_equals_base_bit_for_bit(kind):
    base, ids = tiny_base(kind), tokens(2, 20)
    with torch.no_grad():
        before = base(ids).logits
        model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3))
        assert torch.equal(model(ids).logits, before)
        with attach(base, model.shadow):
            assert torch.equal(base(ids).logits, before)


@torch.no_grad()
def test_attached_detached_and_base_all_differ(model):
    ids = tokens(2, 9)
    logits = {mode: model.set_mode(mode)(ids).logits for mode in ("detached", "base", "attached")}
    assert torch.equal(logits["base"], model.base(ids).logits)
    for one, other in (("attached", "base"), ("detached", "base"), ("attached", "detached")):
        assert (logits[one] - logits[other]).abs().max() > 0.1 * logits["base"].std()


@torch.no_grad()
def test_an_attached_base_computes_and_generates_what_the_pair_does(model, kind):
    base, ids = tiny_base(kind), tokens(2, 9)
    plain = base(ids).logits, base.generate(ids, max_new_tokens=20, do_sample=False)
    with attach(base, model.shadow):
        assert torch.equal(base(ids).logits, model(ids).logits)
        generated = base.generate(ids, max_new_tokens=20, do_sample=False)  # beyond the sliding windows
        assert torch.equal(generated, model.generate(ids, max_new_tokens=20, do_sample=False))
        assert torch.equal(generated, base.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False))
        assert not torch.equal(generated, plain[1])
    assert torch.equal(base(ids).logits, plain[0])
    assert torch.equal(base.generate(ids, max_new_tokens=20, do_sample=False), plain[1])


def test_training_moves_every_trainable_tensor_and_no_frozen_one(kind):
    torch.manual_seed(0)
    model = ShadowForCausalLM.from_base(tiny_base(kind), ShadowConfig(rank=4, update_width=3, dropout=0.0)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    strongest = dict.fromkeys((name for name, p in model.named_parameters() if p.requires_grad), 0.0)
    ids, losses = tokens(4, 12), []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                strongest[name] = max(strongest[name], parameter.grad.abs().max().item())
            else:
                assert parameter.grad is None, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    dead = [name for name, size in strongest.items() if size < 1e-8 and not name.endswith(tuple(NEEDLESS))]
    assert dead == []
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(strongest)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("refused", ["falcon", "bloom"])
def test_a_base_whose_blocks_get_no_keywords_is_refused_with_the_reason(refused):
    config = AutoConfig.for_model(refused, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UnsupportedArchitectureError, match=f"'{refused}' is not supported .its blocks do not receive"):
        ShadowForCausalLM.from_base(AutoModelForCausalLM.from_config(config))


def new_architecture():
    config = AutoConfig.for_model("starcoder2", **{**CONFIGS["mistral"], "sliding_window": None})
    base = AutoModelForCausalLM.from_config(config)
    fill(base, 0)
    return base.eval()


def test_an_unknown_architecture_is_an_error_that_names_the_known_ones_and_the_way_to_add_one():
    with pytest.raises(UnsupportedArchitectureError) as caught:
        architecture_of(new_architecture().config)
    message = str(caught.value)
    assert "'starcoder2'" in message
    assert all(name in message for name in ARCHITECTURES)
    assert "from shadowtune.attach import ARCHITECTURES, Architecture; " in message  # shadowtune.attach is a function
    assert "ARCHITECTURES[model_type] = Architecture(decoder, blocks)" in message
    assert "\n" not in message


@torch.no_grad()
def test_adding_a_row_adds_an_architecture(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", Architecture("model", "layers"))
    base, ids = new_architecture(), tokens(2, 9)
    plain = base(ids).logits
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3))
    assert torch.equal(model(ids).logits, plain)
    fill(model.shadow, 1)
    assert not torch.equal(model(ids).logits, plain)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize("row", [Architecture("transformer", "layers"), Architecture("model", "h")])
def test_a_wrong_row_is_an_error_that_names_the_missing_part(monkeypatch, row):
    monkeypatch.setitem(ARCHITECTURES, "llama", row)
    with pytest.raises(UnsupportedArchitectureError, match=r"has no part '(transformer|h)'"):
        ShadowForCausalLM.from_base(tiny_base())


def test_a_base_with_narrower_embeddings_is_refused():
    base = AutoModelForCausalLM.from_config(tiny_config("opt", word_embed_proj_dim=16))
    with pytest.raises(UnsupportedArchitectureError, match="embeddings have width 16 but its blocks 32"):
        ShadowForCausalLM.from_base(base)
