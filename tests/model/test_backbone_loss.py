"""Which losses train the backbone."""

import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import ConfigError
from tests.support.shadows import perturbed_classifier, perturbed_model, tokens

SETTINGS = {"shadow_loss_weight": 0.3, "distillation_weight": 0.7, "dropout": 0.0, "hidden_size": 16}


def gradients(model, **inputs):
    model.train().zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.shadow.named_parameters() if p.grad is not None}


def causal(length):
    ids = tokens(3, length)
    return {"input_ids": ids, "labels": ids}


CASES = [
    (perturbed_model, causal(9)),  # the boundaries step by step
    (perturbed_model, causal(40)),  # as one operation
    (perturbed_classifier, {"input_ids": tokens(3, 9), "labels": torch.tensor([0, 2, 1])}),
]


@pytest.mark.parametrize(("make", "inputs"), CASES, ids=("steps", "fused", "classes"))
def test_with_its_own_losses_only_those_reach_the_backbone_and_nothing_else_changes(make, inputs):
    joint, joined = gradients(make(**SETTINGS), **inputs)
    own, alone = gradients(make(**SETTINGS, backbone_loss="own"), **inputs)
    assert torch.equal(own.loss, joint.loss)
    model = make(**SETTINGS).train()
    output = model(**inputs)
    terms = 0.3 * output.shadow_loss + 0.7 * output.distillation_loss
    names, parameters = zip(*model.shadow.named_parameters(), strict=True)
    expected = torch.autograd.grad(terms, parameters, allow_unused=True)
    assert alone.keys() == joined.keys()
    for name, gradient in zip(names, expected, strict=True):
        if name.startswith("boundaries."):
            assert torch.equal(alone[name], joined[name]), name
        else:
            torch.testing.assert_close(alone[name], gradient, msg=name)
            assert not torch.allclose(alone[name], joined[name]), name


def test_a_backbone_that_nothing_would_train_is_refused():
    with pytest.raises(ConfigError, match="nothing to learn from"):
        ShadowConfig(backbone_loss="own", shadow_loss_weight=0)
    ShadowConfig(backbone_loss="own", shadow_loss_weight=0, distillation_weight=1.0)
    ShadowConfig(backbone_loss="own", shadow_loss_weight=0, shadow_loss_weight_end=1.0)
