"""The hooks against the fused head that TRL's trainers put on a model."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from shadowtune.data.collate import CausalCollator
from tests.support.runs import causal_rows
from tests.support.shadows import perturbed_model


@pytest.fixture
def batch():
    return CausalCollator(0)(causal_rows(4))


def fused(**settings):
    model = perturbed_model(dropout=0.0, **settings).train()
    add_fused_lm_head(model)
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def mean(log_probs, labels):
    return -log_probs.sum() / (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_log_probabilities_are_the_attached_models_and_the_gradient_is_the_joint_losss(model_type, batch):
    model = fused(model_type=model_type, shadow_loss_weight=0.4)
    outputs = model(**batch)
    outputs.loss.backward()
    expected = gradients(model)
    log_probs = model(**batch, fused_lm_head=True).log_probs
    loss = mean(log_probs, batch["labels"])
    torch.testing.assert_close(loss, outputs.base_loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_labels_that_are_shifted_already_give_the_same_gradient(batch):
    model = fused()
    mean(model(**batch, fused_lm_head=True).log_probs, batch["labels"]).backward()
    expected = gradients(model)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    log_probs = model(**inputs, labels=None, shift_labels=shifted, fused_lm_head=True).log_probs
    mean(log_probs, batch["labels"]).backward()
    actual = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_shadows_term_is_added_in_training_of_both_networks_only(batch):
    model = fused(shadow_loss_weight=0.4)
    reference = fused(shadow_loss_weight=0.0)
    for prepare in (lambda m: m.eval(), lambda m: m.train().set_mode("detached")):
        results = []
        for each in (prepare(model), prepare(reference)):
            mean(each(**batch, fused_lm_head=True).log_probs, batch["labels"]).backward()
            results.append(gradients(each))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


def test_without_labels_in_the_batch_nothing_is_added_and_nothing_fails(batch):
    model = fused()
    batch["labels"][:] = -100
    output = model(**batch, fused_lm_head=True)
    assert not output.log_probs.any()
    output.log_probs.sum().backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_ordinary_calls_are_left_alone(batch):
    model = perturbed_model()
    assert "log_probs" not in model(**batch)
    assert model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 97)


def test_the_trunk_is_the_model_without_its_head(batch):
    model = perturbed_model().eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden_states = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(model.logits_of(hidden_states), model(**inputs).logits)
