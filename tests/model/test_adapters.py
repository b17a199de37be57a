"""Several adapters on one base: each computes what it computes alone, and only the active one is trained and saved."""

import copy

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import CheckpointError, ConfigError
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, perturbed_classifier, perturbed_model, tokens

SECOND = ShadowConfig(variant="stateless", rank=3, dropout=0.0, draft_rank=2)


@torch.no_grad()
def logits(model, **kwargs):
    return model.eval()(tokens(2, 7), **kwargs).logits


@pytest.fixture
def model():
    made = perturbed_model(dropout=0.0)
    made.add_adapter("second", SECOND)
    return made


def test_each_computes_what_it_computes_alone(model):
    first = logits(model)
    alone = perturb(ShadowForCausalLM.from_base(model.base, SECOND))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(model.base)), "a new adapter changes nothing"
    model.shadow.load_state_dict(alone.shadow.state_dict())
    for mode in ("attached", "detached"):
        assert torch.equal(logits(model.set_mode(mode)), logits(alone.set_mode(mode)))
    model.set_mode("attached").set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model.base))


def test_one_alone_is_trained_and_the_others_stay(model):
    inactive = copy.deepcopy(model._inactive["second"].modules["shadow"].state_dict())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train().set_adapter("second")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} != names
    model.set_adapter("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    optimizer.step()
    model.set_adapter("second")
    assert model.shadow.training
    for name, tensor in model.shadow.state_dict().items():
        assert torch.equal(tensor, inactive[name]), name


def test_the_active_one_is_saved_and_loads_beside_others(model, tmp_path):
    model.set_adapter("second")
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(ShadowForCausalLM.from_pretrained(tmp_path / "second", base=model.base)), expected)
    other = ShadowForCausalLM.from_base(model.base, ShadowConfig(rank=2))
    other.load_adapter(tmp_path / "second", "loaded")
    other.set_adapter("loaded")
    assert torch.equal(logits(other), expected)
    assert other.shadow.config == SECOND
    assert other.detached().config.num_hidden_layers == 1
    elsewhere = ShadowForCausalLM.from_base(tiny_base(hidden_size=48), ShadowConfig(rank=2))
    with pytest.raises(CheckpointError):
        elsewhere.load_adapter(tmp_path / "second", "loaded")
    assert elsewhere.adapters == ("default",)


def test_heads_of_a_classifier_go_with_their_adapter():
    model = perturbed_classifier(dropout=0.0)
    first = logits(model)
    model.add_adapter("second")
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_names_that_are_wrong_are_one_line(model):
    with pytest.raises(ConfigError, match="'second' already"):
        model.add_adapter("second")
    with pytest.raises(ConfigError, match=r"no adapter 'secnd' \(did you mean second\?\); there are default, second"):
        model.set_adapter("secnd")
    with pytest.raises(ConfigError, match="'default' is active"):
        model.delete_adapter("default")
    model.delete_adapter("second")
    assert model.adapters == ("default",)
