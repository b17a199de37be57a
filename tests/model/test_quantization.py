import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ShadowtuneError
from shadowtune.model.methods import get_shadow_model, make_trainable
from shadowtune.model.quantization import quantization_arguments
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens

LIBRARY = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_base(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return str(path)


def load(directory, quantization):
    arguments = quantization_arguments(quantization, torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **arguments)


@pytest.mark.parametrize("quantization", list(LIBRARY))
def test_a_quantized_base_trains_decodes_saves_and_loads(directory, quantization, tmp_path):
    pytest.importorskip(LIBRARY[quantization])
    full, base = load(directory, "none"), load(directory, quantization)
    ids = tokens(2, 9)
    error = (base(ids).logits - full(ids).logits).norm() / full(ids).logits.norm()
    assert 1e-4 < error < 0.3  # it is quantized, and still the same model
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3, dropout=0.0))
    perturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.eval()
    uncached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), uncached)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, **quantization_arguments(quantization, torch.float32)
    )
    exact = quantization != "nf4"  # bitsandbytes repacks its weights at the first call, with other rounding
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **({} if exact else {"rtol": 0.0, "atol": 0.05}))


def test_gradients_are_the_same_after_an_evaluation(directory):
    pytest.importorskip("bitsandbytes")
    model = make_trainable(load(directory, "nf4"), "shadow", shadow=ShadowConfig(rank=4, update_width=3, dropout=0.0))
    perturb(model)
    ids = tokens(2, 9)

    def gradients():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert all(before[name].abs().max() > 0 for name in before)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", ["from_base", "get_shadow_model", "make_trainable", "lora", "from_pretrained"])
def test_no_base_beside_trained_parameters_is_repacked(make, directory, tmp_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)  # of a CPU for which bitsandbytes repacks weights

    def repack(*args):
        pytest.fail("repacked: the product has no backward pass")

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    shadow, base = ShadowConfig(rank=4, channel_scaling=True), load(directory, "nf4")
    if make == "from_base":
        model = ShadowForCausalLM.from_base(base, shadow)
    elif make == "get_shadow_model":
        model = get_shadow_model(base, shadow)
    elif make == "from_pretrained":
        get_shadow_model(base, shadow).save_pretrained(tmp_path)
        model = ShadowForCausalLM.from_pretrained(tmp_path, base=load(directory, "nf4"))
    else:
        model = make_trainable(base, "lora" if make == "lora" else "shadow", shadow=shadow)
    with torch.no_grad():
        model.eval()(input_ids=tokens(2, 9))


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ShadowtuneError, match=r"torchao.*pip install 'shadowtune\[quant\]'"):
        quantization_arguments("int8", torch.float32)
