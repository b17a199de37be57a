import pytest
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from shadowtune import ShadowConfig, ShadowModelConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.backbone import mirror_config
from tests.support.bases import CONFIGS, tiny_config


def made(base="llama", backbone="llama", **settings):
    settings = {"num_shadow_layers": 2, **settings}
    backbone_config = mirror_config(tiny_config(backbone), ShadowConfig(**settings))
    return ShadowModelConfig(
        shadow=ShadowConfig(**settings).to_dict(), base_config=tiny_config(base), backbone_config=backbone_config
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_survives_the_way_through_a_file(tmp_path, kind):
    config = made(kind, kind, rank=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.get_text_config().to_dict() == config.get_text_config().to_dict()
    assert loaded.shadow_config == ShadowConfig(rank=3, num_shadow_layers=2)
    assert type(loaded.base_config) is type(config.base_config)


def test_sizes_and_special_tokens_are_the_bases():
    config = made()
    base = config.base_config
    for name in (
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "pad_token_id",
        "eos_token_id",
    ):
        assert getattr(config, name) == getattr(base, name)
    assert made("gpt2").hidden_size == 32


def test_the_configs_given_are_copied():
    base = tiny_config()
    config = ShadowModelConfig(base_config=base, backbone_config=tiny_config())
    config.base_config.hidden_size = 7
    assert base.hidden_size == 32


def test_the_cache_has_the_shadows_layers_first_and_they_hold_every_token():
    layers = DynamicCache(config=made("mistral", "mistral")).layers
    assert [type(layer) for layer in layers] == [DynamicLayer] * 2 + [DynamicSlidingWindowLayer] * 4
    layers = DynamicCache(config=made("llama", "mistral")).layers  # the base knows no window
    assert [type(layer) for layer in layers] == [DynamicLayer] * 6
    layers = DynamicCache(config=made("qwen3_next", "llama")).layers
    assert [type(layer) for layer in layers] == [DynamicLayer] * 2 + [LinearAttentionLayer] * 3 + [DynamicLayer]
    layers = StaticCache(config=made("gemma2", "gemma2"), max_cache_len=40).layers
    assert [layer.max_cache_len for layer in layers] == [40, 40, 16, 40, 16, 40]
    assert type(layers[0]) is StaticLayer


def test_the_text_config_is_a_copy():
    config = made()
    config.get_text_config().num_hidden_layers = 99
    assert config.base_config.num_hidden_layers == 4
    assert config.get_text_config().num_hidden_layers == 6


def test_faults_are_named():
    with pytest.raises(CheckpointError, match="schema_version 9, this shadowtune reads up to 1"):
        ShadowModelConfig(schema_version=9)
    with pytest.raises(ConfigError, match=r"unknown key shadow.alfa \(did you mean alpha\?\)"):
        ShadowModelConfig(shadow={"alfa": 1.0})


def test_it_can_be_made_empty_as_transformers_does_to_find_defaults():
    assert ShadowModelConfig().shadow_config == ShadowConfig()
