import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shadowtune.core import few_rows as module
from shadowtune.core.few_rows import FewRowsLinear, few_rows
from tests.support.shadows import perturbed_model, tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
SHAPES = [(1,), (3, 1), (4,), (2, 2), (5, 7), (64,), (1, 64), (65,), (2, 40)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_it_is_the_linear_layer(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(*shape, 48)
    truth = F.linear(x, layer.weight, layer.bias)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):  # rows that are not next to one another too
        with few_rows(layer):
            assert type(layer) is FewRowsLinear
            ours = layer(given)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(("rows", "fast"), [(3, False), (4, True), (64, True), (65, False)])
def test_it_turns_products_of_few_rows_around(rows, fast, monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(rows, 8)
    monkeypatch.setattr(module.F, "linear", lambda *arguments: "the usual way")
    with few_rows(layer), torch.no_grad():
        assert isinstance(layer(x), torch.Tensor) == fast
    with few_rows(layer):
        assert layer(x) == "the usual way"  # gradients


def test_gradients_are_those_of_the_linear_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(5, 48, requires_grad=True)
    truth = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with few_rows(layer):
        ours = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


def test_only_where_it_is_faster():
    class Other(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), Other(4, 4), nn.Linear(4, 4, device="meta")])
    with few_rows(layers):
        assert not any(isinstance(layer, FewRowsLinear) for layer in layers)


def test_the_layers_are_what_they_were_even_if_it_fails():
    layer = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), few_rows(layer):
        raise ZeroDivisionError
    assert type(layer) is nn.Linear


def test_within_one_another_and_in_two_threads_they_do_no_harm():
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    entered, left = threading.Event(), threading.Event()

    def outer():
        with few_rows(layer):
            entered.set()
            left.wait(20)

    thread = threading.Thread(target=outer)
    thread.start()
    assert entered.wait(20)
    with few_rows(layer), torch.no_grad():
        left.set()
        thread.join()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert type(layer) is nn.Linear


def test_the_head_is_as_well_known_within_it():
    model = perturbed_model()
    with few_rows(model):
        assert model.head.weight is model.base.get_output_embeddings().weight


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_generate_works_with_it(mode, monkeypatch):
    model = perturbed_model().set_mode(mode)
    prompts, seen = tokens(5, 6), []
    turned = FewRowsLinear.forward
    monkeypatch.setattr(FewRowsLinear, "forward", lambda layer, x: seen.append(x.shape) or turned(layer, x))
    said = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    assert (5, 1) in {tuple(shape[:2]) for shape in seen}
    monkeypatch.setattr(module, "MOST", 0)
    slow = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    assert torch.equal(said, slow)
    assert not any(isinstance(layer, FewRowsLinear) for layer in model.modules())
