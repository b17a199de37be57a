import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shadowtune.core import prepacked_linear as module
from shadowtune.core.prepacked_linear import (
    PRODUCTS_BEFORE_PACKING,
    PrepackedForward,
    packing_works,
    prepacked_linear,
)
from tests.support.bases import VOCABULARY
from tests.support.shadows import perturbed_model, tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
packing = pytest.mark.skipif(not packing_works(), reason="MKL does not pack here")
SHAPES = [(1,), (3, 1), (4,), (2, 2), (5, 7), (64,), (1, 64), (65,), (2, 40), (0, 3)]


@pytest.fixture(params=[pytest.param(True, marks=packing), False], ids=["packed", "transposed"])
def packed(request, monkeypatch):
    """Whether weights are copied into MKL's order."""
    if not request.param:
        monkeypatch.setattr(module, "MAX_PACKED_BYTES", 0)
    return request.param


def use(layer, rows=4):
    """Let a layer meet so many small batches that its weight is worth a copy."""
    for _ in range(PRODUCTS_BEFORE_PACKING + 1):
        layer(torch.zeros(rows, layer.in_features))


def is_prepacked(layer):
    return isinstance(vars(layer).get("forward"), PrepackedForward)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_it_is_the_linear_layer(shape, bias, packed):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(*shape, 48)
    truth = F.linear(x, layer.weight, layer.bias)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):  # rows that are not next to one another too
        with prepacked_linear(layer):
            assert type(layer) is nn.Linear
            use(layer)
            assert (layer.forward.packed(4) is not None) == packed
            ours = layer(given)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()


@pytest.mark.parametrize(("rows", "fast"), [(3, False), (4, True), (48, True), (49, False)])
def test_it_transposes_products_of_small_batches(rows, fast, monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(rows, 8)
    monkeypatch.setattr(module.F, "linear", lambda *arguments: "the usual way")
    with prepacked_linear(layer), torch.no_grad():
        assert isinstance(layer(x), torch.Tensor) == fast
    with prepacked_linear(layer):
        assert layer(x) == "the usual way"  # gradients


@packing
@pytest.mark.parametrize(("rows", "fast"), [(1, True), (64, True), (65, False)])
def test_packed_weights_multiply_small_batches(rows, fast, monkeypatch):
    layer, x = nn.Linear(8, 8), torch.randn(rows, 8)
    with prepacked_linear(layer):
        with torch.no_grad():
            use(layer)
            monkeypatch.setattr(module.F, "linear", lambda *arguments: "the usual way")
            assert isinstance(layer(x), torch.Tensor) == fast
        assert layer(x) == "the usual way"  # gradients


def test_gradients_are_those_of_the_linear_layer(packed):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(5, 48, requires_grad=True)
    truth = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with prepacked_linear(layer):
        with torch.no_grad():
            use(layer)
        ours = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(ours, truth, strict=True))


@packing
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(torch.ones(80, 1) @ torch.ones(1, 48)),  # as PEFT merges
        lambda weight: weight.data[7].fill_(3.0),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: torch.optim.SGD([weight], 1.0).step(lambda: weight.grad.sum()),
        lambda weight: weight.copy_(torch.randn_like(weight)),
    ],
    ids=["in place", "one row", "other data", "optimizer", "copied"],
)
@torch.no_grad()
def test_no_copy_outlives_its_context(change):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80), torch.randn(4, 48)
    layer.weight.grad = torch.ones_like(layer.weight)
    with prepacked_linear(layer):
        use(layer)
    change(layer.weight)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with prepacked_linear(layer):
        for _ in range(PRODUCTS_BEFORE_PACKING + 2):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        assert layer.forward.packed(4) is not None


@packing
@torch.no_grad()
def test_a_parameter_put_in_place_of_the_packed_one_is_used():
    layer, x = nn.Linear(48, 80), torch.randn(4, 48)
    with prepacked_linear(layer):
        use(layer)
        layer.weight = nn.Parameter(torch.randn(80, 48))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@packing
@torch.no_grad()
def test_single_rows_are_not_worth_a_copy_and_use_one():
    layer = nn.Linear(48, 80)
    with prepacked_linear(layer):
        use(layer, rows=1)
        assert layer.forward.packed(1) is None
        use(layer)
        assert layer.forward.packed(1) is not None


@packing
@torch.no_grad()
def test_copies_are_shared_and_freed_at_the_end():
    one, other = nn.Linear(48, 80), nn.Linear(48, 80)
    other.weight = one.weight
    with prepacked_linear(one, other, one):
        use(one)
        assert one.forward.packed(1) is other.forward.packed(1)
        copied = weakref.ref(one.forward.packed(1))
        kept = other.forward  # whoever still holds the function of the context
    gc.collect()
    assert copied() is None
    x = torch.randn(4, 48)
    torch.testing.assert_close(kept(x), F.linear(x, one.weight, other.bias))


@packing
@torch.no_grad()
def test_a_layer_is_copied_and_saved_like_any_within_it():
    layer, x = nn.Linear(48, 80), torch.randn(4, 48)
    with prepacked_linear(layer):
        use(layer)
        twins = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
        assert list(layer.state_dict()) == ["weight", "bias"]
    for twin in twins:
        assert torch.equal(twin(x), layer(x))
        twin.weight.zero_()  # the twin reads its own weight
        assert torch.equal(twin(x), twin.bias.expand(4, -1))
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()


@packing
@torch.no_grad()
def test_packed_weights_go_with_any_number_of_threads():
    torch.manual_seed(0)
    layer, x, threads = nn.Linear(200, 300), torch.randn(16, 200), torch.get_num_threads()
    truth = F.linear(x, layer.weight, layer.bias)
    try:
        with prepacked_linear(layer):
            use(layer)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                torch.testing.assert_close(layer(x), truth, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_only_where_it_is_faster():
    class Other(nn.Linear):
        pass

    wrapped = nn.Linear(4, 4)
    forward = wrapped.forward = lambda x: x  # as accelerate does
    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), Other(4, 4), nn.Linear(4, 4, device="meta")])
    layers.append(wrapped)
    with prepacked_linear(layers):
        assert not any(is_prepacked(layer) for layer in layers)
    assert wrapped.forward is forward


def test_the_layers_are_what_they_were_even_if_it_fails():
    layer = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), prepacked_linear(layer):
        raise ZeroDivisionError
    assert vars(layer).keys() == vars(nn.Linear(4, 4)).keys()


def test_within_one_another_and_in_two_threads_they_do_no_harm():
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    entered, left = threading.Event(), threading.Event()

    def outer():
        with prepacked_linear(layer):
            entered.set()
            left.wait(20)

    thread = threading.Thread(target=outer)
    thread.start()
    assert entered.wait(20)
    with prepacked_linear(layer), torch.no_grad():
        left.set()
        thread.join()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not is_prepacked(layer)


@pytest.mark.parametrize("fullgraph", [True])
def test_layers_compile_within_it(fullgraph):
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    with prepacked_linear(layer), torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=fullgraph, backend="eager")(x), layer(x))


def test_the_head_is_as_well_known_within_it():
    model = perturbed_model()
    with prepacked_linear(model):
        assert model.head.weight is model.base.get_output_embeddings().weight


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
@pytest.mark.parametrize("speculate", [False, 4])
def test_generate_works_with_it(mode, speculate, packed):
    if speculate and mode != "attached":
        pytest.skip("only the attached model speculates")
    model = perturbed_model().set_mode(mode)
    prompts = tokens(5, 6)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 16, "do_sample": False}
    plain = model.generate(prompts, **options)
    with prepacked_linear(model):
        fast = model.generate(prompts, **options, speculate=speculate)
        head = model.base.get_output_embeddings().forward
        assert (head.packed(5) is not None) == packed
    assert torch.equal(fast, plain)


@torch.no_grad()
def test_library_generate_uses_the_weights_as_they_are():
    """One head row set through ``.data``, which no version counter sees, decides each answer from then on."""
    model, generator = perturbed_model(), torch.Generator().manual_seed(0)
    head = model.base.get_output_embeddings()
    prompts = tokens(5, 6)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 12, "min_new_tokens": 12}
    model.generate(prompts, do_sample=False, **options)  # often enough to be worth a copy
    for trial in range(40):
        row = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        hidden = model.encode(prompts, use_cache=False)[0].last_hidden_state[:, -1]
        head.weight.data[row] = hidden[trial % 5] * (1 + 0.1 * trial)  # no two rows alike
        generated = model.generate(prompts, do_sample=False, **options)
        logits = model(generated[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :]
        logits[..., 2] = -torch.inf  # the end token, as min_new_tokens does
        assert torch.equal(logits.argmax(-1), generated[:, prompts.shape[1] :]), f"trial {trial}"


def test_library_generate_leaves_the_layers_alone():
    model, seen = perturbed_model(), set()
    for layer in model.modules():
        layer.register_forward_pre_hook(lambda layer, args: seen.add((type(layer), "forward" in vars(layer))))
    prompts = tokens(5, 6)
    model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False)
    assert (nn.Linear, False) in seen
    assert all(type(layer).__module__ != module.__name__ and not replaced for layer, replaced in seen)
