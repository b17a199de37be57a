import json

import pytest
import shadow_peft
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.formats.conversion import convert
from tests.model.formats.third_party import assert_same, base_for, load_peft, ours, peft_adapter, small
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, perturbed_model

TASKS = {"causal_lm": ShadowForCausalLM, "classification": ShadowForSequenceClassification}
PEFT_VARIANT = {
    "update_norm": False,
    "update_bias": True,
    "activation": "gelu",
    "inject_first": True,
    "dropout_position": "hidden",
    "transform_dropout": False,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_a_mirror_of_theirs_gives_their_logits(tmp_path, model_type, task):
    expected = peft_adapter(tmp_path / "a", tmp_path / "base", model_type, task, shadow_num_hidden_layers=2)
    assert_same(ours(TASKS[task].from_pretrained(tmp_path / "a"), task), expected)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("width", [16, 32])
def test_a_mirror_with_embeddings_of_its_own_keeps_them(tmp_path, width, share):
    expected = peft_adapter(tmp_path / "a", tmp_path / "base", shadow_hidden_size=width, share_embeddings=share)
    model = ShadowForCausalLM.from_pretrained(tmp_path / "a")
    assert (model.shadow.embedding is None) == (share and width == 32)
    assert_same(ours(model), expected)
    model.save_pretrained(tmp_path / "ours")
    assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path / "ours")), expected)
    convert(str(tmp_path / "ours"), tmp_path / "again", "peft")
    assert_same(load_peft(tmp_path / "again", tiny_base()), expected)


@pytest.mark.parametrize("width", [16, 32])
def test_a_pretrained_backbone_gives_their_logits_both_ways(tmp_path, width):
    source = small(tmp_path / "small", hidden_size=width, num_attention_heads=2)
    expected = peft_adapter(tmp_path / "a", tmp_path / "base", shadow_model=source)
    model = ShadowForCausalLM.from_pretrained(tmp_path / "a")
    assert_same(ours(model), expected)
    convert(str(tmp_path / "a"), tmp_path / "again", "peft")
    assert_same(load_peft(tmp_path / "again", tiny_base()), expected)


@pytest.mark.parametrize("width", [16, 32])
def test_a_projected_model_as_backbone(tmp_path, width):
    small_model = tiny_base("llama", seed=5, hidden_size=width)
    projected = shadow_peft.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=small_model,
        shadow_hidden_projection=torch.nn.Linear(width, 32, bias=False),
        lm_head=torch.nn.Linear(32, small_model.config.vocab_size, bias=False),
        init_optimal_projection=False,
    )
    projected.save_pretrained(tmp_path / "small")
    expected = peft_adapter(tmp_path / "a", tmp_path / "base", shadow_model=str(tmp_path / "small"))
    if width == 32:
        with pytest.raises(ConfigError, match="projection between equal widths"):
            ShadowForCausalLM.from_pretrained(tmp_path / "a")
    else:
        assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path / "a")), expected)


def test_a_vanished_backbone_is_named_and_can_be_given(tmp_path):
    source = small(tmp_path / "small")
    expected = peft_adapter(tmp_path / "a", tmp_path / "base", shadow_model=source)
    (tmp_path / "small").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="cannot read the config of the backbone"):
        ShadowForCausalLM.from_pretrained(tmp_path / "a")
    assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path / "a", backbone=str(tmp_path / "moved"))), expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt"])
def test_what_we_write_loads_there_and_comes_back_bit_for_bit(tmp_path, model_type, task):
    base = base_for(task, model_type, tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    settings = ShadowConfig(rank=4, update_width=3, alpha=0.7, num_shadow_layers=2, shadow_loss_weight=0.3)
    settings = ShadowConfig.from_dict({**settings.to_dict(), **PEFT_VARIANT})
    model = perturb(TASKS[task].from_base(base, settings)).eval()
    model.save_pretrained(tmp_path / "ours")
    done = convert(str(tmp_path / "ours"), tmp_path / "theirs", "peft")
    assert not done.notes
    expected = ours(model, task)
    back = TASKS[task].from_pretrained(tmp_path / "theirs")
    for (name, tensor), (_, again) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(tensor, again), name
    assert back.shadow.config == model.shadow.config
    assert_same(load_peft(tmp_path / "theirs", base_for(task, model_type), task), expected)


def test_a_papers_shadow_is_refused_with_every_field_at_fault(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    perturbed_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError) as refused:
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "peft", base=str(tmp_path / "base"))
    for fault in ("update_norm=True", "update_bias=False", "activation='silu'", "inject_first=False"):
        assert fault in str(refused.value)
    assert not list((tmp_path / "theirs").glob("*"))


def test_a_mirror_that_peft_builds_otherwise_is_refused(tmp_path):
    tiny_base("gemma2").save_pretrained(tmp_path / "base")
    perturbed_model("gemma2", **PEFT_VARIANT).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="backbone layer_types"):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "peft", base=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LORA"}, "type 'LORA'"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
        ({"shadow_alpha": "much"}, "alpha"),
    ],
)
def test_what_is_no_shadow_of_ours_is_refused(tmp_path, changes, said):
    peft_adapter(tmp_path / "a", tmp_path / "base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((CheckpointError, ConfigError), match=said):
        ShadowForCausalLM.from_pretrained(tmp_path / "a")


def test_an_adapter_of_some_blocks_is_refused(tmp_path):
    peft_adapter(tmp_path / "a", tmp_path / "base", target_modules=["model.layers.1", "model.layers.2"])
    with pytest.raises(ConfigError, match="adapts 2 of 4 blocks"):
        ShadowForCausalLM.from_pretrained(tmp_path / "a")


def test_a_base_of_another_width_is_refused(tmp_path):
    peft_adapter(tmp_path / "a", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"wrong base.*width 32 and 4 blocks.*width 64"):
        ShadowForCausalLM.from_pretrained(tmp_path / "a", base=tiny_base(hidden_size=64))


def test_damage_is_named(tmp_path):
    peft_adapter(tmp_path / "a", tmp_path / "base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        ShadowForCausalLM.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is damaged"):
        ShadowForCausalLM.from_pretrained(tmp_path / "a")
