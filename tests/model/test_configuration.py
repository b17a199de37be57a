import dataclasses
import json

import pytest
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from shadowtune import ShadowConfig, ShadowModelConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.backbone import mirror_config
from shadowtune.model.configuration import Initialization
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


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Initialization("random"), "at random"),
        (Initialization("random", projection="random"), "at random, projection: random"),
        (
            Initialization("base_layers", layers=(0, 11), projection="selection"),
            "as copies of base blocks 0, 11, projection: selection",
        ),
        (
            Initialization("pretrained", "org/small", projection="least_squares", projection_error=0.41234),
            "from the pretrained model org/small, projection: least squares, relative error of the head 0.41",
        ),
        (Initialization("detached", "runs/a/model"), "from the earlier shadow runs/a/model"),
    ],
)
def test_how_it_started_is_kept_and_told(tmp_path, start, words):
    config = made()
    config.initialization = dataclasses.asdict(start)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).start == start
    assert str(start) == words


def test_a_config_of_before_loads_and_does_not_know_how_it_started(tmp_path):
    config = made()
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["initialization"], values["shadow"]["init_layers"], values["shadow"]["init_from"]
    file.write_text(json.dumps(values))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.start is None
    assert loaded.shadow_config == config.shadow_config


def test_copied_layers_survive_the_way_through_a_file(tmp_path):
    made(init_layers=(0, -1)).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).shadow_config.init_layers == (0, -1)


def test_the_file_names_the_package_that_reads_it(tmp_path):
    made().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "import shadowtune" in values["library"]
    assert ShadowModelConfig.from_pretrained(tmp_path).library == values["library"]
