"""What the detached shadow learns from: the attached model, or, alone, the bare base."""

import pytest
import torch

from shadowtune.core import reference
from shadowtune.core.losses import top_tokens
from shadowtune.errors import ConfigError
from tests.support.shadows import perturbed_classifier, perturbed_model, tokens

TEACHING = {
    "shadow_loss_weight": 0.3,
    "distillation_weight": 0.7,
    "distillation_temperature": 2.0,
    "matching_weight": 0.2,
    "dropout": 0.0,
}


def labels_like(ids):
    labels = ids.clone()
    labels[:, :4] = -100
    return labels


def divergence(teacher, student, labels, temperature):
    kept = labels[:, 1:] != -100
    p, q = (torch.log_softmax(x[:, :-1][kept].double() / temperature, -1) for x in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def logits(model, mode, ids):
    return model.set_mode(mode)(ids, use_cache=False).logits


def test_the_attached_model_teaches_the_shadow():
    model, ids = perturbed_model(**TEACHING), tokens(3, 9)
    labels = labels_like(ids)
    attached, detached = logits(model, "attached", ids), logits(model, "detached", ids)
    output = model.set_mode("attached").train()(ids, labels=labels)
    torch.testing.assert_close(
        output.distillation_loss.double(), divergence(attached, detached, labels, 2.0), rtol=1e-4, atol=1e-6
    )
    total = output.base_loss + 0.3 * output.shadow_loss
    total = total + 0.7 * output.distillation_loss + 0.2 * output.matching_loss
    torch.testing.assert_close(output.loss, total)


def test_what_is_taught_leaves_the_boundaries_alone():
    model, ids = perturbed_model(**TEACHING), tokens(3, 9)
    output = model.train()(ids, labels=labels_like(ids))
    taught = output.distillation_loss + output.matching_loss
    names, parameters = zip(*model.shadow.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(taught, parameters, allow_unused=True), strict=True):
        moved = gradient is not None and bool(gradient.any())
        assert moved == name.startswith("backbone."), name


def test_alone_the_shadow_learns_from_the_bare_base():
    model, ids = perturbed_model(**TEACHING), tokens(3, 9)
    labels = labels_like(ids)
    base, detached = logits(model, "base", ids), logits(model, "detached", ids)
    output = model.set_mode("detached").train()(ids, labels=labels)
    assert output.base_loss is None
    torch.testing.assert_close(
        output.shadow_loss.double(), reference.cross_entropy(detached.double(), labels), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        output.distillation_loss.double(), divergence(base, detached, labels, 2.0), rtol=1e-4, atol=1e-6
    )
    total = 0.3 * output.shadow_loss + 0.7 * output.distillation_loss + 0.2 * output.matching_loss
    torch.testing.assert_close(output.loss, total)
    output.loss.backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.shadow.boundaries.parameters())
    assert all(p.grad is not None for p in model.shadow.backbone.parameters())


def test_alone_and_in_evaluation_nobody_teaches():
    model, ids = perturbed_model(**TEACHING), tokens(3, 9)
    calls = []
    model.base.model.register_forward_hook(lambda *call: calls.append(call))
    output = model.set_mode("detached").eval()(ids, labels=labels_like(ids))
    assert not calls
    assert output.distillation_loss is None
    assert torch.equal(output.loss, output.shadow_loss)


def test_alone_and_without_a_teacher_the_scale_is_one():
    model, ids = perturbed_model(shadow_loss_weight=0.3), tokens(3, 9)
    output = model.set_mode("detached").train()(ids, labels=labels_like(ids))
    assert torch.equal(output.loss, output.shadow_loss)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_lambda_of_a_call_replaces_that_of_the_config(weight):
    model, ids = perturbed_model(shadow_loss_weight=0.3), tokens(3, 9)
    output = model(ids, labels=labels_like(ids), shadow_loss_weight=weight)
    expected = output.base_loss if weight == 0 else output.base_loss + weight * output.shadow_loss
    torch.testing.assert_close(output.loss, expected)


def top_divergence(teacher, student, labels, k, temperature):
    kept = labels[:, 1:] != -100
    logits, chosen = teacher[:, :-1][kept].double().topk(k)
    p = torch.softmax(logits / temperature, -1)
    q = torch.log_softmax(student[:, :-1][kept].double() / temperature, -1).gather(1, chosen)
    return temperature**2 * (p * (p.log() - q)).sum(-1).mean()


@pytest.mark.parametrize("model_type", ["llama", "gemma2"], ids=["linear head", "softcap"])
@pytest.mark.parametrize(("mode", "teacher"), [("attached", "attached"), ("detached", "base")])
def test_the_teacher_may_show_its_most_likely_tokens_alone(mode, teacher, model_type):
    model, ids = perturbed_model(model_type, **TEACHING, distillation_top_k=5), tokens(3, 9)
    labels = labels_like(ids)
    expected = top_divergence(logits(model, teacher, ids), logits(model, "detached", ids), labels, 5, 2.0)
    output = model.set_mode(mode).train()(ids, labels=labels)
    torch.testing.assert_close(output.distillation_loss.double(), expected, rtol=1e-4, atol=1e-6)
    total = 0.3 * output.shadow_loss + 0.7 * output.distillation_loss + 0.2 * output.matching_loss
    torch.testing.assert_close(output.loss, total if mode == "detached" else output.base_loss + total)


def known(model, ids):
    """The base's 5 most likely tokens at each position, as a call takes them."""
    top = top_tokens(model.head, model.base_states(input_ids=ids).flatten(0, 1), 5, 2.0)
    names = ("teacher_tokens", "teacher_log_probabilities")
    return {name: part.view(*ids.shape, 5) for name, part in zip(names, top, strict=True)}


@pytest.mark.parametrize("matching_weight", [0.0, 0.2])
def test_tokens_that_are_known_spare_the_base_unless_its_states_are_needed(matching_weight):
    settings = {**TEACHING, "distillation_top_k": 5, "matching_weight": matching_weight}
    model, ids = perturbed_model(**settings).set_mode("detached").train(), tokens(3, 9)
    labels, kept = labels_like(ids), known(model, ids)
    fresh = model(ids, labels=labels)
    calls = []
    model.base.model.register_forward_hook(lambda *call: calls.append(call))
    output = model(ids, labels=labels, **kept)
    assert len(calls) == (1 if matching_weight else 0)
    torch.testing.assert_close(output.loss, fresh.loss)
    parameters = list(model.shadow.backbone.parameters())
    pairs = zip(*(torch.autograd.grad(each.loss, parameters) for each in (output, fresh)), strict=True)
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth)


def test_the_tokens_that_are_given_are_learned_from():
    model, ids = perturbed_model(**{**TEACHING, "distillation_top_k": 5, "matching_weight": 0.0}), tokens(3, 9)
    model.set_mode("detached").train()
    kept = known(model, ids)
    others = {**kept, "teacher_tokens": (kept["teacher_tokens"] + 1) % 97}
    losses = [model(ids, labels=labels_like(ids), **each).distillation_loss for each in (kept, others)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_more_tokens_than_there_are_cannot_be_looked_at():
    assert perturbed_model(distillation_top_k=97)
    with pytest.raises(
        ConfigError, match=r"^distillation_top_k=98 is more than the 97 tokens of the base's vocabulary"
    ):
        perturbed_model(distillation_top_k=98)


def test_a_classifier_looks_at_all_classes():
    with pytest.raises(ConfigError, match=r"^distillation_top_k=2 is for language models; .*: leave it out$"):
        perturbed_classifier(distillation_top_k=2)


@pytest.mark.parametrize("top_k", [None, 5])
def test_micro_batches_add_up(top_k):
    model, ids = perturbed_model(**TEACHING, distillation_top_k=top_k), tokens(3, 9)
    labels = labels_like(ids)
    count = int((labels[:, 1:] != -100).sum())
    for mode in ("attached", "detached"):
        model.set_mode(mode).train()
        whole = model(ids, labels=labels).loss
        parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
        torch.testing.assert_close(sum(parts), whole)


def test_a_classifier_teaches_too():
    model, ids = perturbed_classifier(**TEACHING), tokens(3, 9)
    labels = torch.tensor([0, 1, 2])
    output = model.train()(ids, labels=labels)
    with torch.no_grad():
        attached = model(ids).logits
        detached = model.set_mode("detached")(ids).logits
    p, q = (torch.log_softmax(x.double() / 2.0, -1) for x in (attached, detached))
    expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(output.distillation_loss.double(), expected, rtol=1e-4, atol=1e-6)
    total = output.base_loss + 0.3 * output.shadow_loss
    torch.testing.assert_close(output.loss, total + 0.7 * output.distillation_loss + 0.2 * output.matching_loss)
