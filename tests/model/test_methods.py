import sys

import pytest
import torch
from transformers import PreTrainedConfig

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.config.training import LoraConfig
from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.model.methods import (
    context_length,
    load_base,
    load_trained,
    make_trainable,
    parameter_table,
    trainable_parameters,
)
from tests.support.bases import BLOCKS, WIDTH, tiny_base, tiny_classifier
from tests.support.shadows import perturb, tokens


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_shadow_is_trained_beside_a_frozen_base():
    model = make_trainable(tiny_base(), "shadow", shadow=ShadowConfig(rank=3))
    assert isinstance(model, ShadowForCausalLM)
    assert trained_names(model) == {f"shadow.{name}" for name, _ in model.shadow.named_parameters()}
    assert model.shadow.boundaries.injection_downs.shape[-1] == 3


def test_a_shadow_of_a_classifier_trains_both_heads():
    model = make_trainable(tiny_classifier(), "shadow", "classification")
    assert isinstance(model, ShadowForSequenceClassification)
    assert {"score.weight", "shadow_score.weight"} <= trained_names(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_have_the_rank_and_kind_asked_for(method):
    settings = LoraConfig(rank=3, alpha=6.0, target_modules=["q_proj", "v_proj"])
    names = trained_names(make_trainable(tiny_base(), method, lora=settings))
    assert all("q_proj" in name or "v_proj" in name for name in names)
    assert any("magnitude" in name for name in names) == (method == "dora")
    assert len(names) == 2 * BLOCKS * (3 if method == "dora" else 2)


def test_lora_on_all_linear_layers_counts_what_its_rank_says():
    model = make_trainable(tiny_base(), "lora", lora=LoraConfig(rank=2))
    per_block = 4 * 2 * WIDTH - 2 * 16 + 3 * (WIDTH + 48)  # q, o: 32+32; k, v: 32+16; gate, up, down: 32+48
    assert trainable_parameters(model) == 2 * BLOCKS * per_block


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_classifiers_head_is_trained_with_its_adapters(method):
    names = trained_names(make_trainable(tiny_classifier(), method, "classification"))
    assert any("score" in name for name in names)


def test_full_trains_every_parameter():
    model = make_trainable(tiny_base(), "full")
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["shadow", "lora", "dora", "full"])
def test_trained_parameters_have_the_dtype_asked_for(method, base_dtype, dtype):
    model = make_trainable(tiny_base().to(base_dtype), method, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == (set() if method == "full" else {base_dtype})
    loss = model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("method", ["shadow", "lora", "dora", "full"])
def test_the_parameter_table_adds_up(method):
    model = make_trainable(tiny_base(), method)
    rows = parameter_table(model)
    assert sum(total for _, total, _ in rows) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(trained for _, _, trained in rows) == trainable_parameters(model)
    parts = {part: trained for part, _, trained in rows}
    assert (parts["base"] == 0) == (method != "full")


def test_the_parameter_table_names_the_parts_of_a_shadow_and_the_heads_of_classifiers():
    model = make_trainable(tiny_classifier(), "shadow", "classification", ShadowConfig(hidden_size=16, rank=4))
    parts = {part for part, _, _ in parameter_table(model)}
    assert parts == {
        "base",
        "shadow backbone",
        "shadow projection",
        "shadow input_projection",
        "shadow boundaries",
        "classification heads",
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("method", ["shadow", "lora", "full"])
def test_context_length_is_read_under_the_architectures_own_name(method, model_type):
    targets = ["q_proj", "c_attn", "query_key_value"]
    settings = LoraConfig(rank=2, target_modules=targets)
    assert context_length(make_trainable(tiny_base(model_type), method, lora=settings)) == 128


def test_a_model_without_a_limit_has_no_context_length():
    model = torch.nn.Module()
    model.config = PreTrainedConfig()
    assert context_length(model) is None


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot load the model .*nowhere"):
        load_base(str(tmp_path / "nowhere"))


def test_a_base_is_known_by_the_name_it_was_asked_for(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    assert load_base(str(tmp_path / "base")).config.name_or_path == str(tmp_path / "base")


def test_a_run_without_a_model_has_not_finished(tmp_path):
    with pytest.raises(CheckpointError, match="has not finished training"):
        load_trained(tmp_path / "model", "shadow", "causal_lm", "any")


@pytest.mark.parametrize("method", ["shadow", "lora", "dora", "full"])
def test_what_was_saved_is_loaded_into_another_copy_of_the_base(method, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = make_trainable(load_base(str(tmp_path / "base")), method, lora=LoraConfig(rank=2))
    perturb(model, scale=0.1).eval().save_pretrained(tmp_path / "model")
    loaded = load_trained(tmp_path / "model", method, "causal_lm", str(tmp_path / "base"))
    assert not loaded.training
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert not torch.allclose(tiny_base()(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_damaged_files_are_one_line_that_names_the_directory(damage, method, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    make_trainable(load_base(str(tmp_path / "base")), method).save_pretrained(tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "missing":
        file.unlink()
    else:
        make_trainable(tiny_base(hidden_size=16), method).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / file.name).replace(file)
    with pytest.raises(CheckpointError, match=f"cannot load .*{tmp_path / 'model'}") as caught:
        load_trained(tmp_path / "model", method, "causal_lm", str(tmp_path / "base"))
    assert "\n" not in str(caught.value)


def test_adapters_of_a_classifier_without_a_config_are_refused(tmp_path):
    tiny_classifier().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), "classification")
    make_trainable(base, "lora", "classification").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"cannot read config\.json of"):
        load_trained(tmp_path / "model", "lora", "classification", str(tmp_path / "base"))


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ShadowtuneError, match=r"pip install 'shadowtune\[peft\]'"):
        make_trainable(tiny_base(), "lora")
