import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shadowtune.core import few_rows as module
from shadowtune.core.few_rows import BEFORE_PACKING, FewRowsLinear, few_rows, packing_works
from tests.support.shadows import perturbed_model, tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
packing = pytest.mark.skipif(not packing_works(), reason="MKL does not pack here")
SHAPES = [(1,), (3, 1), (4,), (2, 2), (5, 7), (64,), (1, 64), (65,), (2, 40), (0, 3)]


@pytest.fixture(params=[pytest.param(True, marks=packing), False], ids=["packed", "turned"])
def packed(request, monkeypatch):
    """Whether weights are copied into MKL's order."""
    if not request.param:
        monkeypatch.setattr(module, "PACKED_BYTES", 0)
    return request.param


def use(layer, rows=4):
    """Let a layer meet few rows so often that its weight is worth a copy."""
    for _ in range(BEFORE_PACKING + 1):
        layer(torch.zeros(rows, layer.in_features))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_it_is_the_linear_layer(shape, bias, packed):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(*shape, 48)
    truth = F.linear(x, layer.weight, layer.bias)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):  # rows that are not next to one another too
        with few_rows(layer):
            assert type(layer) is FewRowsLinear
            use(layer)
            assert (layer.products.packed(4) is not None) == packed
            ours = layer(given)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(("rows", "fast"), [(3, False), (4, True), (48, True), (49, False)])
def test_it_turns_products_of_few_rows_around(rows, fast, monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(rows, 8)
    monkeypatch.setattr(module.F, "linear", lambda *arguments: "the usual way")
    with few_rows(layer), torch.no_grad():
        assert isinstance(layer(x), torch.Tensor) == fast
    with few_rows(layer):
        assert layer(x) == "the usual way"  # gradients


@packing
@pytest.mark.parametrize(("rows", "fast"), [(1, True), (64, True), (65, False)])
def test_packed_weights_multiply_few_rows(rows, fast, monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(rows, 8)
    with few_rows(layer), torch.no_grad():
        use(layer)
        monkeypatch.setattr(module.F, "linear", lambda *arguments: "the usual way")
        assert isinstance(layer(x), torch.Tensor) == fast
    with few_rows(layer):
        assert layer(x) == "the usual way"  # gradients


def test_gradients_are_those_of_the_linear_layer(packed):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(5, 48, requires_grad=True)
    truth = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with few_rows(layer):
        with torch.no_grad():
            use(layer)
        ours = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


@packing
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(torch.ones(80, 1) @ torch.ones(1, 48)),  # as PEFT merges
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: torch.optim.SGD([weight], 1.0).step(lambda: weight.grad.sum()),
        lambda weight: weight.copy_(torch.randn_like(weight)),
    ],
    ids=["in place", "other data", "optimizer", "copied"],
)
@torch.no_grad()
def test_a_changed_weight_is_packed_anew(change):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(4, 48)
    layer.weight.grad = torch.ones_like(layer.weight)
    with few_rows(layer):
        use(layer)
    change(layer.weight)
    for _ in range(2):
        with few_rows(layer):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
            use(layer)
            assert layer.products.packed(4) is not None


@packing
@torch.no_grad()
def test_single_rows_are_not_worth_a_copy_and_use_one():
    layer, before = nn.Linear(48, 80), len(module._COPIES)
    with few_rows(layer):
        use(layer, rows=1)
        assert (layer.products.packed(1), len(module._COPIES)) == (None, before)
        use(layer)
        assert layer.products.packed(1) is not None


@packing
@torch.no_grad()
def test_copies_are_kept_shared_and_die_with_their_weight():
    gc.collect()
    one, other, before = nn.Linear(48, 80), nn.Linear(48, 80), len(module._COPIES)
    other.weight = one.weight
    with few_rows(one, other):
        assert (one.products.packed(1), len(module._COPIES)) == (None, before)
        use(one)
        use(other)
        assert one.products.packed(4) is other.products.packed(4)
    with few_rows(one):
        assert one.products.packed(4) is not None  # at once
    assert len(module._COPIES) == before + 1
    del one, other
    gc.collect()
    assert len(module._COPIES) == before


@packing
@torch.no_grad()
def test_a_layer_with_a_packed_weight_is_copied_and_saved_like_any():
    layer, x = nn.Linear(48, 80), torch.randn(4, 48)
    with few_rows(layer):
        use(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert vars(twin).keys() == vars(nn.Linear(1, 1)).keys()
        assert torch.equal(twin(x), layer(x))
    assert list(layer.state_dict()) == ["weight", "bias"]


@packing
@torch.no_grad()
def test_packed_weights_go_with_any_number_of_threads():
    torch.manual_seed(0)
    layer, x, threads = nn.Linear(200, 300), torch.randn(16, 200), torch.get_num_threads()
    truth = F.linear(x, layer.weight, layer.bias)
    try:
        with few_rows(layer):
            use(layer)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                torch.testing.assert_close(layer(x), truth, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_only_where_it_is_faster():
    class Other(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), Other(4, 4), nn.Linear(4, 4, device="meta")])
    with torch.inference_mode():
        layers.append(nn.Linear(4, 4))
    with few_rows(layers):
        assert not any(isinstance(layer, FewRowsLinear) for layer in layers)


def test_the_layers_are_what_they_were_even_if_it_fails():
    layer = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), few_rows(layer):
        raise ZeroDivisionError
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(nn.Linear(4, 4)).keys()


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
        torch.testing.assert_close(FewRowsLinear.forward(layer, x), layer(x))  # called just before the other left
    assert type(layer) is nn.Linear


def test_the_head_is_as_well_known_within_it():
    model = perturbed_model()
    with few_rows(model):
        assert model.head.weight is model.base.get_output_embeddings().weight


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_generate_works_with_it(mode, monkeypatch, packed):
    model = perturbed_model().set_mode(mode)
    prompts, seen = tokens(5, 6), []
    fast = FewRowsLinear.forward

    def spy(layer, x):
        seen.append((tuple(x.shape[:2]), layer.products.packed(1) is not None))
        return fast(layer, x)

    monkeypatch.setattr(FewRowsLinear, "forward", spy)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 16, "do_sample": False}
    said = model.generate(prompts, **options)
    assert ((5, 1), packed) in seen
    monkeypatch.setattr(module, "MOST", 0)
    slow = model.generate(prompts, **options)
    assert torch.equal(said, slow)
    assert not any(isinstance(layer, FewRowsLinear) for layer in model.modules())
