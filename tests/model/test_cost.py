import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import LoraConfig
from shadowtune.errors import ConfigError
from shadowtune.model.budget import shapeless_base
from shadowtune.model.cost import BatchShape, check_countable, loss_cost, prompt_cost, training_cost, weight_bytes
from shadowtune.model.methods import make_trainable, objective_of, trainable_parameters
from shadowtune.model.speed import MeasuredClock, Roofline
from tests.support.bases import BLOCKS, CONFIGS, tiny_base, tiny_config

ROWS, LENGTH = 2, 12


def shapeless(method="shadow", model_type="llama", task="causal_lm", **shadow):
    with torch.device("meta"):
        base = shapeless_base(tiny_config(model_type), task)
        return make_trainable(base, method, task, ShadowConfig(**shadow), LoraConfig(rank=4))


def step(model, method="shadow", rows=ROWS, length=LENGTH, labelled=1.0, task="causal_lm", padded=False):
    return training_cost(model, BatchShape(rows, length, labelled, padded), objective_of(method, task))


def saved_bytes(model, ids, mask):
    """Bytes that a real forward pass keeps for the backward pass, apart from the weights."""
    storages = {}
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("variant", ["paper", "stateless"])
def test_activations_are_those_of_a_real_forward_pass(variant):
    config = ShadowConfig(variant=variant, dropout=0.1)
    real = make_trainable(tiny_base().requires_grad_(False), "shadow", shadow=config).train()
    ids = torch.randint(1, 90, (8, 32))
    counted = step(shapeless(variant=variant, dropout=0.1), rows=8, length=32)
    assert counted.activations == pytest.approx(saved_bytes(real, ids, torch.ones_like(ids)), rel=0.05)
    assert counted.peak > counted.activations


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_of_padding_is_counted_in_each_block(padded):
    real = make_trainable(tiny_base().requires_grad_(False), "shadow", shadow=ShadowConfig()).train()
    mask = torch.ones(2, 64, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    found = saved_bytes(real, torch.randint(1, 90, (2, 64)), mask)
    assert step(shapeless(), length=64, padded=padded).activations == pytest.approx(found, rel=0.05)


def test_what_is_left_are_the_gradients_and_nothing_is_counted_twice():
    model = shapeless()
    counted = step(model)
    assert counted.left == 4 * trainable_parameters(model)
    assert step(model).peak == counted.peak
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("model_type", sorted({"qwen3", "gemma3_text", "gpt2", "phi3", "granite"} & set(CONFIGS)))
@pytest.mark.parametrize("method", ["shadow", "lora", "full"])
def test_every_architecture_and_method_is_counted(model_type, method):
    if (model_type, method) in {("gpt2", "lora")}:
        pytest.importorskip("peft")
    counted = step(shapeless(method, model_type), method)
    assert counted.peak > counted.activations > 0
    assert counted.flops > 0


def test_a_classifier_is_counted():
    counted = step(shapeless(task="classification"), task="classification")
    assert counted.peak > counted.activations > 0


def test_the_cache_has_its_exact_size():
    heads, head_dim, networks = 2, 8, BLOCKS + 1
    counted = prompt_cost(shapeless(), ROWS, LENGTH)
    assert counted.left == 2 * networks * heads * head_dim * ROWS * LENGTH * 4


def test_fewer_labels_and_checkpointing_need_less():
    few, whole = step(shapeless(), labelled=0.1, length=64), step(shapeless(), length=64)
    assert few.flops < whole.flops
    model = shapeless()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert step(model, length=64).activations < 0.6 * whole.activations


def test_an_evaluation_costs_less_than_training():
    model = shapeless()
    assert loss_cost(model, BatchShape(ROWS, LENGTH), objective_of("shadow", "causal_lm")).peak < step(model).peak


def test_products_are_counted_by_their_shapes():
    """Training a frozen base costs its linear layers twice: forward, and backward to their inputs."""
    model = shapeless(variant="stateless", shadow_loss_weight=0.0)
    model.freeze_unused()
    model.requires_grad_(False)
    forward = loss_cost(model, BatchShape(1, 32), objective_of("shadow", "causal_lm"))
    blocks = sum(p.numel() for name, p in model.named_parameters() if "base.model.layers" in name and p.ndim == 2)
    assert forward.flops > 2 * 32 * blocks
    assert forward.flops < 1.6 * 2 * 32 * (blocks + 97 * 32)


def test_quantized_weights_take_their_bytes():
    model = shapeless()
    linear = sum(layer.weight.numel() for layer in model.base.model.layers.modules() if type(layer) is torch.nn.Linear)
    assert weight_bytes(model) - weight_bytes(model, "nf4") == pytest.approx(linear * (4 - 0.5625), abs=64)


def test_experts_are_refused():
    with pytest.raises(ConfigError, match="experts"):
        check_countable(tiny_config("mixtral"))


def test_clocks_add_up_the_operations():
    counted = step(shapeless())
    assert Roofline(1e12, 1e12, 1e30, "").seconds(counted.operations) == pytest.approx(counted.flops / 1e12)
    clock = MeasuredClock()
    once = clock.seconds(counted.operations)
    assert 0 < once < 5
    assert clock.seconds(counted.operations) == once  # measured once
