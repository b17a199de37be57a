import copy
import importlib.util

import pytest
import torch
from transformers import Trainer

import shadowtune.peft
from shadowtune import train_in_stages
from shadowtune.data.collate import CausalCollator
from shadowtune.errors import ConfigError
from tests.support.bases import tiny_base
from tests.support.runs import arguments, causal_rows
from tests.support.shadows import tokens

SETTINGS = {"r": 4, "update_hidden_size": 3, "shadow_dropout": 0.0}
CFG = {"adapter": "shadowtune", "shadowtune": {**SETTINGS, "shadow_epochs": 1, "shadow_learning_rate": 1e-2}}


def trainer_of(model, path):
    rows = causal_rows(8)
    args = arguments(path, max_steps=2)
    return Trainer(model, args, CausalCollator(0), train_dataset=rows, eval_dataset=rows)


def test_the_hooks_train_what_one_call_trains(axolotl, tmp_path):
    torch.manual_seed(0)
    plugin = axolotl.ShadowtunePlugin()
    plugin.pre_model_load(CFG)
    base = tiny_base()
    model, config = plugin.load_adapter(copy.deepcopy(base), CFG)
    assert isinstance(config, shadowtune.peft.ShadowtuneConfig) and (config.r, config.update_hidden_size) == (4, 3)
    twin = copy.deepcopy(model.active_model.shadow.state_dict())
    torch.manual_seed(1)
    trainer = trainer_of(model, tmp_path)
    plugin.post_trainer_create(CFG, trainer)
    assert model.active_model.shadow.config.shadow_loss_weight == 0.0  # the joint stage's
    trainer.train()
    plugin.post_train(CFG, trainer.model)
    plugin.post_train(CFG, trainer.model)  # Axolotl calls it twice
    assert model.active_model.shadow.config.shadow_loss_weight == 1.0

    reference, _ = plugin.load_adapter(copy.deepcopy(base), CFG)
    reference.active_model.shadow.load_state_dict(twin)
    torch.manual_seed(1)
    train_in_stages(trainer_of(reference, tmp_path), shadow_epochs=1, shadow_learning_rate=1e-2)
    found, expected = (each.active_model.shadow.state_dict() for each in (model, reference))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in twin.items())
    assert (
        model.active_model.shadow.config.logit_interpolation == reference.active_model.shadow.config.logit_interpolation
    )


def test_a_resumed_run_trains_the_shadow_no_second_time(axolotl, tmp_path):
    plugin = axolotl.ShadowtunePlugin()
    model, _ = plugin.load_adapter(tiny_base(), CFG)
    before = copy.deepcopy(model.active_model.shadow.state_dict())
    plugin.post_trainer_create({**CFG, "resume_from_checkpoint": "x"}, trainer_of(model, tmp_path))
    assert all(torch.equal(model.active_model.shadow.state_dict()[name], tensor) for name, tensor in before.items())
    assert not next(model.active_model.shadow.backbone.parameters()).requires_grad


def test_a_saved_adapter_is_loaded_frozen_for_inference(axolotl, tmp_path):
    plugin, base = axolotl.ShadowtunePlugin(), tiny_base()
    model, _ = plugin.load_adapter(copy.deepcopy(base), CFG)
    for parameter in model.active_model.shadow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    ids = tokens(2, 6)
    assert not torch.equal(model.eval()(input_ids=ids).logits, base(input_ids=ids).logits)
    for inference in (True, False):
        cfg = {**CFG, "lora_model_dir": str(tmp_path)}
        loaded, _ = plugin.load_adapter(copy.deepcopy(base), cfg, inference=inference)
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
        trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
        assert bool(trained) != inference


def test_other_adapters_and_trainers_of_preferences_are_left_alone(axolotl):
    plugin = axolotl.ShadowtunePlugin()
    assert plugin.load_adapter(None, {"adapter": "lora"}) is None
    plugin.pre_model_load({"adapter": "lora", "sample_packing": True})
    plugin.post_trainer_create({"adapter": "lora"}, None)
    plugin.post_trainer_create({**CFG, "rl": "dpo"}, None)
    plugin.post_train({}, None)
    assert plugin.load_adapter(None, CFG, config_only=True)[0] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shadowtune": {"rr": 4}}, "unknown key shadowtune.rr"),
        ({"shadowtune": {"r": 0}}, "r"),
        ({"sample_packing": True}, "set sample_packing: false"),
        ({"deepspeed": "zero3.json"}, "leave fsdp_config and deepspeed out"),
    ],
)
def test_wrong_settings_are_errors_before_the_model_is_loaded(axolotl, changes, said):
    with pytest.raises(ConfigError, match=said):
        axolotl.ShadowtunePlugin().pre_model_load({**CFG, **changes})


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs axolotl")
def test_axolotl_itself_finds_the_plugin_and_loads_the_adapter(axolotl):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register("shadowtune.integrations.axolotl.ShadowtunePlugin")
    assert manager.supports_adapter("shadowtune")
    assert manager.get_input_args() == ["shadowtune.integrations.axolotl.ShadowtuneArgs"]
    from axolotl.loaders.adapter import load_adapter

    model, config = load_adapter(tiny_base(), DictDefault(CFG), "shadowtune")
    assert config.r == 4 and model.active_model.shadow.config.rank == 4
