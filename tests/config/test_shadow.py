import dataclasses
import json

import pytest

from shadowtune import ShadowConfig
from shadowtune.errors import ConfigError


def test_defaults_are_the_papers():
    config = ShadowConfig()
    assert config.update and config.update_norm and config.transform_dropout
    assert not config.update_bias and not config.inject_first
    assert (config.depth_sharing, config.activation, config.dropout_position) == ("backbone", "silu", "rank")
    assert (config.backbone, config.num_shadow_layers, config.hidden_size) == ("mirror", 1, None)
    assert config.shadow_loss_weight == 0.05


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("variant", "statless", "stateless"),
        ("rank", 0, 1),
        ("update_width", 0, 1),
        ("alpha", -0.1, 0.0),
        ("alpha", float("nan"), 0.0),
        ("dropout", 1.0, 0.999),
        ("dropout", -0.1, 0.0),
        ("shadow_loss_weight", -0.1, 0.0),
        ("shadow_loss_weight", float("inf"), 10.0),
        ("distillation_top_k", 0, 1),
        ("num_shadow_layers", 0, 1),
        ("hidden_size", 0, 1),
        ("intermediate_size", 0, 1),
        ("num_attention_heads", 0, 1),
        ("num_key_value_heads", 0, 1),
        ("head_dim", 0, 1),
        ("init_std", -1.0, 0.0),
        ("depth_sharing", "none", "full"),
        ("activation", "relu", "gelu"),
        ("dropout_position", "before", "hidden"),
        ("backbone_loss", "both", "own"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, bad, good):
    with pytest.raises(ConfigError, match=rf"^{name} must be"):
        ShadowConfig(**{name: bad})
    assert vars(ShadowConfig(**{name: good}))[name] == good


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"rank.*; dropout"):
        ShadowConfig(rank=0, dropout=1.5)


def test_to_dict_and_from_dict_are_inverse_for_every_field():
    config = ShadowConfig(
        variant="stateless",
        rank=3,
        update_width=5,
        alpha=0.7,
        dropout=0.1,
        shadow_loss_weight=0.3,
        shadow_loss_weight_end=0.6,
        distillation_weight=0.4,
        distillation_temperature=2.0,
        distillation_top_k=8,
        matching_weight=0.1,
        backbone_loss="own",
        backbone="some/model",
        init_from="some/shadow",
        num_shadow_layers=2,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        draft_rank=3,
        draft_layers=(1, -1),
        draft_steps=2,
        update=False,
        depth_sharing="full",
        update_norm=False,
        update_bias=True,
        activation="gelu",
        transform_dropout=False,
        inject_first=True,
        injection_start=0.3,
        injection_after=(5, 6),
        channel_scaling=True,
        logit_interpolation=0.3,
        dropout_position="hidden",
        init_std=0.5,
    )
    defaults = ShadowConfig()
    names = [field.name for field in dataclasses.fields(config) if field.name != "init_layers"]  # it excludes others
    assert all(vars(config)[name] != vars(defaults)[name] for name in names), "change every field"
    assert ShadowConfig.from_dict(config.to_dict()) == config
    copies = ShadowConfig(init_layers=(0, -1))
    assert ShadowConfig.from_dict(json.loads(json.dumps(copies.to_dict()))) == copies


def test_the_copied_blocks_give_the_number_of_blocks():
    assert ShadowConfig(init_layers=(0, -1)).num_shadow_layers == 2
    assert ShadowConfig.from_dict({"init_layers": [3], "num_shadow_layers": 1}).init_layers == (3,)
    assert ShadowConfig(init_layers=[0, 0, 1], num_shadow_layers=3).num_shadow_layers == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_layers": ()}, "init_layers must name a block of the base at least, got none; init_layers=None"),
        ({"backbone": "x"}, r"init_layers \[0\] copies blocks .* but backbone is 'x'; leave one of the two out"),
        ({"init_from": "d"}, r"init_layers \[0\] and init_from 'd' both say .*; leave one of the two out"),
        ({"num_shadow_layers": 2}, r"num_shadow_layers 2 is not the number of init_layers \[0\]; leave it out"),
        ({"backbone": "x", "init_from": "d"}, "backbone is 'x'.*; .*init_from 'd'"),
    ],
)
def test_ways_to_start_that_contradict_each_other_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        ShadowConfig(**{"init_layers": (0,), **settings})


def test_layers_that_are_no_numbers_are_named():
    with pytest.raises(ConfigError, match=r"shadow.init_layers\[1\] must be int, got 'last'"):
        ShadowConfig.from_dict({"init_layers": [0, "last"]})


def test_from_dict_refuses_unknown_keys_and_names_the_part():
    with pytest.raises(ConfigError, match=r"unknown key shadow\.rnak \(did you mean rank\?\)"):
        ShadowConfig.from_dict({"rnak": 3})


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShadowConfig().rank = 3
