"""``torch.compile(fullgraph=True)``: one graph without a break, and what it computes is what eager mode does."""

import pytest
import torch
from transformers import StaticCache

from shadowtune import ShadowConfig, ShadowForSequenceClassification
from tests.support.bases import tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "mode"), [("llama", "attached"), ("llama", "detached"), ("gemma2", "attached")])
@torch.no_grad()
def test_a_forward_call(kind, mode):
    model, ids = perturbed_model(kind).set_mode(mode), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    fast = compiled(model)
    close(
        fast(ids, attention_mask=mask, use_cache=False).logits, model(ids, attention_mask=mask, use_cache=False).logits
    )
    model.set_mode("base")  # a mode is no constant of the graph
    close(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_forward_call_through_inductor():
    model, ids = perturbed_model(), tokens(2, 9)
    close(compiled(model, "inductor")(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


STATELESS = {"variant": "stateless", "alpha": 0.003}


@pytest.mark.parametrize("settings", [{}, STATELESS], ids=["paper", "stateless"])
@torch.no_grad()
def test_decode_steps_with_a_static_cache(settings):
    model, ids = perturbed_model(**settings), tokens(2, 20)
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :8], past_key_values=cache, use_cache=True)
    step = compiled(model)
    for position in range(8, 12):
        found = step(
            ids[:, position : position + 1],
            position_ids=torch.full((2, 1), position),
            past_key_values=cache,
            use_cache=True,
        )
        close(found.logits[:, 0], expected[:, position])


def training_step(model, call, *inputs):
    model.zero_grad()
    loss = call(*inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("settings", [{}, STATELESS], ids=["paper", "stateless"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step(checkpointed, settings):
    model, ids = perturbed_model(dropout=0.0, **settings).train(), tokens(2, 9)
    labels = ids.clone()
    labels[:, :5] = -100
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    eager = training_step(model, lambda: model(ids, labels=labels))
    fast = compiled(model, "aot_eager")
    for one, other in zip(training_step(model, lambda: fast(ids, labels=labels)), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_classifiers_training_step():
    base = tiny_classifier()
    model = perturb(ShadowForSequenceClassification.from_base(base, ShadowConfig(rank=4, dropout=0.0))).train()
    ids, labels = tokens(3, 9), torch.tensor([0, 2, 1])
    eager = training_step(model, lambda: model(ids, labels=labels))
    fast = compiled(model, "aot_eager")
    for one, other in zip(training_step(model, lambda: fast(ids, labels=labels)), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
