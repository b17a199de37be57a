import pytest
import torch

from shadowtune import ShadowConfig
from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.model.methods import make_trainable
from shadowtune.model.objective import (
    causal_loss,
    causal_objective,
    class_objective,
    is_finite,
    joint_causal_objective,
    joint_class_objective,
)
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.runs import causal_rows, class_rows
from tests.support.shadows import perturb, perturbed_model


@pytest.fixture
def batch():
    return CausalCollator(0)(causal_rows(4))


@pytest.fixture
def classes():
    return ClassificationCollator(0)(class_rows(4))


def perturbed_classifier():
    return perturb(make_trainable(tiny_classifier(), "shadow", "classification", ShadowConfig(rank=4)))


def head_positions(model):
    """A list that receives, for each call of the model's head, at how many positions it was computed."""
    counts = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: counts.append(output[..., 0].numel()))
    return counts


def test_causal_loss_and_its_gradients_are_transformers_own(batch):
    model = tiny_base().requires_grad_(True)
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = causal_objective(model, batch, None)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_causal_loss_computes_logits_only_where_a_row_has_a_label(batch):
    model = tiny_base()
    counts = head_positions(model)
    labelled_columns = int((batch["labels"][:, 1:] != -100).any(0).sum())
    causal_loss(model, batch, None)
    assert counts == [labelled_columns * 4]
    assert counts[0] < batch["labels"].numel()


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_losses_are_sums_divided_by_the_items_of_the_step(count, batch, classes):
    labels = int((batch["labels"][:, 1:] != -100).sum())
    plain, pair = tiny_base(), perturbed_model()
    for objective, model, inputs, own in (
        (causal_objective, plain, batch, labels),
        (joint_causal_objective, pair, batch, labels),
        (class_objective, tiny_classifier(), classes, 4),
        (joint_class_objective, perturbed_classifier().eval(), classes, 4),
    ):
        mean, share = objective(model, inputs, None), objective(model, inputs, count)
        for name in mean:
            torch.testing.assert_close(share[name], mean[name] * own / 7)


def test_class_loss_is_transformers_own(classes):
    model = tiny_classifier()
    torch.testing.assert_close(class_objective(model, classes, None)["loss"], model(**classes).loss)


def test_joint_objectives_give_the_models_own_terms(batch, classes):
    for objective, model, inputs in (
        (joint_causal_objective, perturbed_model(), batch),
        (joint_class_objective, perturbed_classifier().eval(), classes),
    ):
        outputs, terms = model(**inputs), objective(model, inputs, None)
        assert terms.keys() == {"loss", "base_loss", "shadow_loss"}
        for name, term in terms.items():
            torch.testing.assert_close(term, outputs[name])


def test_a_weight_of_zero_has_no_shadow_term(batch):
    assert joint_causal_objective(perturbed_model(shadow_loss_weight=0.0), batch, None).keys() == {"loss", "base_loss"}


def test_measuring_the_joint_loss_computes_no_other_logits_but_one_a_row(batch):
    model = perturbed_model().eval()
    counts = head_positions(model)
    joint_causal_objective(model, batch, None)
    assert counts == [4]  # the losses sweep over the vocabulary without the module


def test_the_batch_is_left_as_it_was(batch):
    before = dict(batch)
    causal_objective(tiny_base(), batch, None)
    assert batch.keys() == before.keys()


def test_is_finite_sees_every_entry():
    numbers = torch.ones(5)
    assert is_finite(numbers)
    numbers[3] = float("inf")
    assert not is_finite(numbers)


@pytest.mark.parametrize("method", ["shadow", "full"])
def test_given_shifted_labels_replace_the_labels(method, batch):
    """Context parallelism splits a sequence between processes: the next label of a part's end is another process's."""
    model = perturbed_model() if method == "shadow" else tiny_base()
    objective = joint_causal_objective if method == "shadow" else causal_objective
    expected = objective(model, batch, 7)["loss"]
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    other = torch.full_like(batch["labels"], 5)
    found = objective(model, {**batch, "labels": other, "shift_labels": shifted}, 7)["loss"]
    torch.testing.assert_close(found, expected)
