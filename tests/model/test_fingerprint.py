import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.model.fingerprint import base_fingerprint
from tests.support.bases import tiny_base, tiny_classifier


def test_equal_weights_have_equal_fingerprints_and_others_do_not():
    assert base_fingerprint(tiny_base()) == base_fingerprint(tiny_base())
    assert base_fingerprint(tiny_base()) != base_fingerprint(tiny_base(seed=1))
    assert base_fingerprint(tiny_base()) != base_fingerprint(tiny_base(num_hidden_layers=3))


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "layers.3.self_attn.q_proj.weight", "norm.weight"])
def test_a_change_of_any_one_weight_shows(name):
    base = tiny_base()
    before = base_fingerprint(base)
    with torch.no_grad():
        base.model.get_parameter(name).mul_(1.5)
    assert base_fingerprint(base) != before


def test_precision_and_task_do_not_matter():
    base = tiny_base()
    before = base_fingerprint(base)
    classifier = tiny_classifier(num_labels=2)
    classifier.model.load_state_dict(base.model.state_dict())
    assert base_fingerprint(classifier) == before
    assert base_fingerprint(base.to(torch.bfloat16)) == before


def test_a_shadow_does_not_matter():
    base = tiny_base()
    before = base_fingerprint(base)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    assert base_fingerprint(base) == before == model.config.base_fingerprint
    with attach(base, model.shadow):
        assert base_fingerprint(base) == before


def test_what_has_no_weights_of_its_own_has_no_fingerprint():
    base = tiny_base()
    base.config.quantization_config = {"quant_method": "torchao"}
    assert base_fingerprint(base) is None
    assert base_fingerprint(tiny_base().to("meta")) is None
