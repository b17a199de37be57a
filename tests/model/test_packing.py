import pytest
import torch

from shadowtune import ShadowConfig
from shadowtune.attach import ARCHITECTURES
from shadowtune.data.collate import PackedCollator
from shadowtune.model.methods import make_trainable, objective_of
from tests.support.bases import CONFIGS, tiny_base
from tests.support.shadows import perturb, tokens

LENGTHS = (5, 40, 1, 2, 33, 60)  # beyond the sliding windows of 16; together beyond the 128 learned positions
SHADOW = ShadowConfig(rank=4, update_width=3, alpha=0.7, dropout=0.0, shadow_loss_weight=0.3)
PACKING = sorted(name for name, architecture in ARCHITECTURES.items() if architecture.packs)


def documents():
    rows = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [-100] * (number % 2) + ids[number % 2 :]} for number, ids in enumerate(rows)]


def model_of(kind, method="shadow", shadow=SHADOW, **overrides):
    torch.manual_seed(0)
    model = make_trainable(tiny_base(kind, **overrides), method, shadow=shadow)
    return (perturb(model) if method == "shadow" else model).train()


def loss_and_gradients(model, method, batches):
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss = sum(objective_of(method, "causal_lm")(model, batch, count)["loss"] for batch in batches)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss, dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))


def alone():
    return [{name: torch.tensor([row[name]]) for name in row} for row in documents()]


def assert_same(found, expected):
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            assert (found[1][name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("method", ["shadow", "full"])
@pytest.mark.parametrize("kind", PACKING)
def test_packed_documents_give_the_loss_and_gradients_of_each_alone(kind, method):
    model = model_of(kind, method)
    packed = loss_and_gradients(model, method, [PackedCollator()(documents())])
    assert_same(packed, loss_and_gradients(model, method, alone()))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_packed_documents_stay_apart_under_adapters_of_peft(method):
    model = perturb(model_of("llama", method), scale=0.1).eval()  # no dropout
    packed = loss_and_gradients(model, method, [PackedCollator()(documents())])
    assert_same(packed, loss_and_gradients(model, method, alone()))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sizes", [{"hidden_size": 16, "num_attention_heads": 2}, {"num_shadow_layers": 2}])
def test_both_networks_keep_documents_apart_whatever_their_sizes_and_attention(implementation, sizes):
    shadow = ShadowConfig(rank=4, update_width=3, dropout=0.0, **sizes)
    model = model_of("llama", shadow=shadow, attn_implementation=implementation)
    packed = loss_and_gradients(model, "shadow", [PackedCollator()(documents())])
    assert_same(packed, loss_and_gradients(model, "shadow", alone()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_positions_that_run_on_would_let_documents_see_each_other(kind):
    model, batch = model_of(kind), PackedCollator()(documents()[:4])
    apart, _ = loss_and_gradients(model, "shadow", [batch])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    assert abs(loss_and_gradients(model, "shadow", [batch])[0] - apart) > 1e-3


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - set(PACKING)))
def test_what_is_not_said_to_pack_really_does_not(kind):
    model = model_of(kind, "full")
    packed, _ = loss_and_gradients(model, "full", [PackedCollator()(documents())])
    assert abs(packed - loss_and_gradients(model, "full", alone())[0]) > 1e-4


def test_most_architectures_pack():
    assert sorted(CONFIGS.keys() - set(PACKING)) == ["gpt_oss", "opt", "qwen3_next"]
