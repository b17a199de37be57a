import pytest
import torch
import torch.nn.functional as F

from shadowtune.core.losses import LossWeights, classification_loss, joint_classification_loss

CLASSES = {
    "one_class": ((5, 3), torch.tensor([0, 2, 1, 1, 0]), "single_label_classification"),
    "regression": ((5, 1), torch.tensor([0.5, 2, -1, 1, 0]), "regression"),
    "regression_of_integers": ((5, 1), torch.tensor([1, 2, 0, 1, 0]), "regression"),
    "several_numbers": ((5, 3), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), "regression"),
    "several_classes": ((5, 3), torch.eye(5, 3), "multi_label_classification"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classification_losses_are_transformers_own(case):
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    shape, labels, problem_type = CLASSES[case]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    class Config:
        num_labels = shape[1]

    Config.problem_type = problem_type
    expected = ForSequenceClassificationLoss(labels.float() if "regression" in case else labels, logits, Config)
    torch.testing.assert_close(classification_loss(logits, labels, problem_type), expected)
    if case != "several_numbers":  # which transformers, too, takes for several classes unless told
        torch.testing.assert_close(classification_loss(logits, labels), expected)


@pytest.mark.parametrize("case", CLASSES)
def test_micro_batches_of_classes_add_up_to_the_whole(case):
    shape, labels, problem_type = CLASSES[case]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = [
        classification_loss(logits[i : i + 1], labels[i : i + 1], problem_type, labels.numel())
        for i in range(len(labels))
    ]
    torch.testing.assert_close(sum(parts), classification_loss(logits, labels, problem_type))


@pytest.mark.parametrize("case", CLASSES)
def test_the_joint_loss_is_the_weighted_sum_of_its_terms(case):
    shape, labels, problem_type = CLASSES[case]
    generator = torch.Generator().manual_seed(0)
    logits, shadow_logits = torch.randn(2, *shape, generator=generator).requires_grad_()
    h, s = torch.randn(2, 5, 4, generator=generator).requires_grad_()
    weights = LossWeights(0.3, 0.7, 2.0, 0.2)
    joint = joint_classification_loss(logits, shadow_logits, h, s, labels, weights, problem_type)
    torch.testing.assert_close(joint.base, classification_loss(logits, labels, problem_type))
    torch.testing.assert_close(joint.shadow, classification_loss(shadow_logits, labels, problem_type))
    if problem_type == "single_label_classification":
        p, q = (torch.log_softmax(x / 2.0, -1) for x in (logits, shadow_logits))
        expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    else:
        expected = F.mse_loss(shadow_logits, logits, reduction="sum") / labels.numel()
    torch.testing.assert_close(joint.distillation, expected)
    torch.testing.assert_close(joint.matching, ((s - h).norm(dim=-1) / h.norm(dim=-1)).square().mean())
    total = joint.base + 0.3 * joint.shadow + 0.7 * joint.distillation + 0.2 * joint.matching
    torch.testing.assert_close(joint.total, total)
    for term in (joint.distillation, joint.matching):
        gradients = torch.autograd.grad(term, (logits, h), retain_graph=True, allow_unused=True)
        assert not any(gradient is not None and gradient.any() for gradient in gradients)


def test_terms_of_no_weight_are_not_computed():
    logits, states = torch.randn(5, 3), torch.randn(5, 4)
    joint = joint_classification_loss(logits, logits, states, states, torch.arange(5) % 3, LossWeights(0.3))
    assert joint.distillation is None
    assert joint.matching is None
