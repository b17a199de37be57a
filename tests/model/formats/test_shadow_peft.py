import json

import pytest
import shadow_peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.formats.conversion import convert
from tests.model.formats.third_party import assert_same, base_for, load_shadow_peft, ours, shadow_peft_adapter, small
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model

TASKS = {"causal_lm": ShadowForCausalLM, "classification": ShadowForSequenceClassification}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_a_mirror_of_theirs_gives_their_logits(tmp_path, model_type, task):
    expected = shadow_peft_adapter(tmp_path, model_type, task, num_shadow_layers=2)
    model = TASKS[task].from_pretrained(tmp_path, base=base_for(task, model_type))
    assert_same(ours(model, task), expected)


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "mistral", "smollm3"])
def test_a_mirror_of_other_architectures(tmp_path, model_type):
    expected = shadow_peft_adapter(tmp_path, model_type, num_shadow_layers=2)
    assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base(model_type))), expected)


def test_a_mirror_of_smaller_sizes(tmp_path):
    expected = shadow_peft_adapter(
        tmp_path, "qwen3", shadow_intermediate_size=20, shadow_num_attention_heads=2, shadow_num_key_value_heads=1
    )
    model = ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base("qwen3"))
    assert (model.shadow.config.intermediate_size, model.shadow.config.num_key_value_heads) == (20, 1)
    assert_same(ours(model), expected)


@pytest.mark.parametrize("width", [16, 32])
def test_an_explicit_backbone_needs_its_config_and_gives_their_logits(tmp_path, width):
    source = small(tmp_path / "small", hidden_size=width)
    expected = shadow_peft_adapter(
        tmp_path / "a", shadow_model=shadow_peft.AutoModelForCausalLM.from_pretrained(source)
    )
    with pytest.raises(ConfigError, match="pass backbone="):
        ShadowForCausalLM.from_pretrained(tmp_path / "a", base=tiny_base())
    model = ShadowForCausalLM.from_pretrained(tmp_path / "a", base=tiny_base(), backbone=source)
    assert_same(ours(model), expected)


def test_an_explicit_backbone_without_embeddings_shares_the_bases(tmp_path):
    expected = shadow_peft_adapter(tmp_path / "a", num_shadow_layers=2)
    source = small(tmp_path / "small", hidden_size=32, intermediate_size=48)
    model = ShadowForCausalLM.from_pretrained(tmp_path / "a", base=tiny_base(), backbone=source)
    assert model.shadow.embedding is None
    assert_same(ours(model), expected)


def test_a_mirror_that_they_build_otherwise_is_written_as_explicit_with_the_bases_embedding(tmp_path):
    tiny_base("gemma2").save_pretrained(tmp_path / "base")
    model = perturbed_model("gemma2", num_shadow_layers=2)
    model.save_pretrained(tmp_path / "ours")
    done = convert(str(tmp_path / "ours"), tmp_path / "theirs", "shadow-peft", base=str(tmp_path / "base"))
    assert any("the base's embedding is copied" in note for note in done.notes)
    back = ShadowForCausalLM.from_pretrained(tmp_path / "theirs", base=tiny_base("gemma2"))
    assert_same(ours(back), ours(model))
    config = AutoConfig.for_model(**json.loads((tmp_path / "theirs" / "backbone_config.json").read_text()))
    explicit = AutoModel.from_config(config)
    attached, _ = load_shadow_peft(tmp_path / "theirs", "gemma2", shadow_model=explicit)
    torch.testing.assert_close(attached, ours(model)[0], rtol=1e-5, atol=1e-5)


def test_heads_that_were_not_trained_are_the_bases(tmp_path):
    shadow_peft_adapter(tmp_path, task="classification", modules_to_save=["shadow_classifier_head"])
    base = tiny_classifier()
    model = ShadowForSequenceClassification.from_pretrained(tmp_path, base=base)
    assert torch.equal(model.score.weight, base.score.weight)
    assert not torch.equal(model.shadow_score.weight, base.score.weight)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt"])
def test_what_we_write_loads_there_and_comes_back_bit_for_bit(tmp_path, model_type, task):
    base = base_for(task, model_type, tmp_path / "base")
    settings = ShadowConfig(rank=4, update_width=3, alpha=0.7, num_shadow_layers=2)
    model = perturb(TASKS[task].from_base(base, settings)).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "shadow-peft", base=str(tmp_path / "base"))
    assert_same(load_shadow_peft(tmp_path / "theirs", model_type, task), ours(model, task))
    back = TASKS[task].from_pretrained(tmp_path / "theirs", base=base_for(task, model_type))
    for (name, tensor), (_, again) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(tensor, again), name
    assert back.shadow.config == model.shadow.config


def test_an_explicit_backbone_that_we_write_needs_no_config_here(tmp_path):
    source = small(tmp_path / "small")
    tiny_base().save_pretrained(tmp_path / "base")
    model = perturbed_model(backbone=source)
    model.save_pretrained(tmp_path / "ours")
    done = convert(str(tmp_path / "ours"), tmp_path / "theirs", "shadow-peft", base=str(tmp_path / "base"))
    assert any("shadow_model=" in note for note in done.notes)
    back = ShadowForCausalLM.from_pretrained(tmp_path / "theirs", base=tiny_base())
    assert_same(ours(back), ours(model))
    config = AutoConfig.for_model(**json.loads((tmp_path / "theirs" / "backbone_config.json").read_text()))
    assert_same(load_shadow_peft(tmp_path / "theirs", shadow_model=AutoModel.from_config(config)), ours(model))


def test_two_blocks_leave_one_boundary_and_no_update(tmp_path):
    base = tiny_base(num_hidden_layers=2)
    base.save_pretrained(tmp_path / "base")
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3, alpha=0.7))).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "shadow-peft", base=str(tmp_path / "base"))
    again = tiny_base(num_hidden_layers=2)
    inner = shadow_peft.ShadowPeftModel.from_pretrained(again, str(tmp_path / "theirs"))
    del inner
    assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path / "theirs", base=str(tmp_path / "base"))), ours(model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "gelu", "update_bias": True}, r"update_bias=True.*activation='gelu' \(it has 'silu'\)"),
        ({"update": False}, "update=False"),
        ({"depth_sharing": "full"}, "depth_sharing='full'"),
        ({"inject_first": True}, "inject_first=True"),
        ({"update_width": 1}, "update_width=1"),
        ({"hidden_size": 16}, "hidden_size=16"),
    ],
)
def test_what_it_cannot_hold_is_named_and_nothing_is_left(tmp_path, settings, said):
    tiny_base().save_pretrained(tmp_path / "base")
    perturbed_model(**settings).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=said):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "shadow-peft", base=str(tmp_path / "base"))
    assert not list((tmp_path / "theirs").glob("*"))


def test_the_base_must_be_given_and_fit(tmp_path):
    shadow_peft_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="pass base="):
        ShadowForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"wrong base.*width 32 and 4 blocks.*width 64 and 4 blocks"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base(hidden_size=64))


def test_a_classifier_is_not_loaded_as_a_language_model(tmp_path):
    shadow_peft_adapter(tmp_path, task="classification")
    with pytest.raises(ConfigError, match="ShadowForSequenceClassification"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())


def test_a_trained_language_model_head_is_refused(tmp_path):
    shadow_peft_adapter(tmp_path, modules_to_save=["shadow_lm_head"])
    with pytest.raises(ConfigError, match=r"modules_to_save.*shadow_lm_head"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())


def test_damage_is_named(tmp_path):
    shadow_peft_adapter(tmp_path)
    file = tmp_path / "shadow_adapter.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    lost = "shadow_update_model.update_gates.0.2.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(CheckpointError, match=f"has no {lost}"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())
    file.unlink()
    with pytest.raises(CheckpointError, match="has no shadow_adapter"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())
