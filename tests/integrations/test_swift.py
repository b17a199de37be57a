import copy
from types import SimpleNamespace

import pytest
import torch

from shadowtune.errors import ConfigError
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import tokens

SETTINGS = {"r": 4, "update_hidden_size": 3, "shadow_dropout": 0.0}


@pytest.mark.parametrize(("task", "make"), [("causal_lm", tiny_base), ("seq_cls", tiny_classifier)])
def test_the_tuner_makes_saves_and_loads_a_shadow(swift, task, make, tmp_path):
    tuner = swift.register(**SETTINGS)
    assert swift.tuners_map["shadow"] is tuner and "dummy" in swift.tuners_map
    base, ids = make().eval(), tokens(2, 6)
    model = tuner.prepare_model(SimpleNamespace(task_type=task), copy.deepcopy(base))
    assert any(parameter.requires_grad for parameter in model.parameters())
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model.eval()(input_ids=ids).logits
    assert not torch.equal(expected, base(input_ids=ids).logits)
    state = {name: parameter for name, parameter in model.state_dict().items() if "base_model.model." not in name}
    tuner.save_pretrained(model, str(tmp_path), state_dict=state)
    loaded = tuner.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    assert any(parameter.requires_grad for parameter in loaded.parameters())


def test_names_and_settings_are_checked_when_the_tuner_is_registered(swift):
    first = swift.register(**SETTINGS)
    assert swift.register(r=8) is not first  # again, with other settings
    for settings, said in (
        ({"rr": 4}, "unknown key register.rr"),
        ({"r": 0}, "r"),
        ({"name": "dummy"}, "ms-swift has a tuner 'dummy' of its own"),
    ):
        with pytest.raises(ConfigError, match=said):
            swift.register(**settings)
