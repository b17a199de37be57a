"""The whole attached stack against ``core.reference.stack``, with the base's own blocks, in float64."""

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.core import reference
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens

VARIANTS = {
    "paper": {},
    "no_update": {"update": False},
    "full_sharing": {"depth_sharing": "full"},
    "projected": {"hidden_size": 16, "num_shadow_layers": 2},
    "peft": {"update_norm": False, "update_bias": True, "activation": "gelu", "inject_first": True},
    "upper_half": {"injection_start": 0.5, "inject_first": True},
}


@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_the_reference(variant, length):
    torch.manual_seed(0)
    config = ShadowConfig(
        **{"rank": 4, "update_width": 3, "alpha": 0.7, "shadow_loss_weight": 0.3, **VARIANTS[variant]}
    )
    model = perturb(ShadowForCausalLM.from_base(tiny_base().double(), config, dtype=torch.float64)).eval()
    ids, labels = tokens(2, length), tokens(2, length, seed=1)
    labels[0, 1:3] = -100
    base, shadow = model.base.model, model.shadow
    embedded = base.embed_tokens(ids)
    initial = shadow.begin(ids, embedded).initial
    positions = torch.arange(length).unsqueeze(0)
    call = {
        "position_embeddings": base.rotary_emb(embedded, positions),
        "position_ids": positions,
        "attention_mask": None,
    }
    blocks = [lambda h, block=block: block(h, **call) for block in base.layers]
    top = base.norm(reference.stack(blocks, embedded, initial, dict(shadow.boundaries.named_parameters()), config))
    logits = model.base.lm_head(top)
    slow = reference.cross_entropy(logits, labels)
    slow = slow + 0.3 * reference.cross_entropy(model.base.lm_head(initial), labels)

    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss, slow, rtol=1e-10, atol=1e-10)
    if length == 1:
        assert output.loss == 0
        return
    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = zip(names, torch.autograd.grad(output.loss, trained), torch.autograd.grad(slow, trained), strict=True)
    for name, ours, truth in gradients:
        assert truth.any(), name
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
