import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    pipeline,
)

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, ShadowModelConfig
from shadowtune.errors import CheckpointError
from shadowtune.model.checkpoint import read_tensors, write_tensors
from shadowtune.model.files import WEIGHTS
from shadowtune.model.loading import load_tensors
from tests.support.bases import CONFIGS, tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer

MODES = ("attached", "detached", "base")
SETTINGS = {"rank": 4, "update_width": 3, "alpha": 0.7}


def made(base_directory, dtype=torch.float32, base_dtype=torch.float32, **settings):
    base = AutoModelForCausalLM.from_pretrained(base_directory, dtype=base_dtype)
    torch.manual_seed(0)
    return perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS, **settings), dtype=dtype)).eval()


@torch.no_grad()
def logits(model):
    return {mode: model.set_mode(mode)(tokens(2, 9)).logits for mode in MODES}


def assert_same(model, loaded):
    assert type(loaded) is type(model)
    assert not loaded.training
    before, after = logits(model), logits(loaded)
    for mode in MODES:
        assert torch.equal(before[mode], after[mode]), mode
    kinds = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()} == kinds


VARIANTS = {
    "paper": {},
    "projected": {"hidden_size": 16, "intermediate_size": 24},
    "full_sharing": {"depth_sharing": "full"},
    "no_update": {"update": False},
    "peft": {"update_norm": False, "update_bias": True, "activation": "gelu", "inject_first": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_computes_what_was_saved(base_directory, tmp_path, variant):
    model = made(base_directory, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_is_saved_and_loaded(kind, tmp_path):
    model = perturbed_model(kind, num_shadow_layers=2)
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, base=tiny_base(kind)))


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_base_and_shadow_keep_their_own_precision(base_directory, tmp_path, base_dtype):
    model = made(base_directory, dtype=torch.bfloat16, base_dtype=base_dtype, hidden_size=16)
    model.shadow.boundaries.float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=base_dtype)
    assert_same(model, loaded)
    assert loaded.shadow.backbone.rotary_emb.inv_freq.dtype == torch.float32


def test_a_sharded_save_loads(base_directory, tmp_path):
    model = made(base_directory)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("own_width", [32, 16])
def test_a_pretrained_backbone_is_saved_with_its_embedding_and_not_needed_again(base_directory, tmp_path, own_width):
    backbone = tmp_path / "backbone"
    tiny_base("qwen2", seed=5, hidden_size=own_width, num_hidden_layers=2).save_pretrained(backbone)
    model = made(base_directory, backbone=str(backbone))
    model.save_pretrained(tmp_path / "shadow")
    (backbone / "config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shadow")
    assert_same(model, loaded)
    assert torch.equal(loaded.shadow.embedding.weight, model.shadow.embedding.weight)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_is_saved_with_both_heads(tmp_path, num_labels):
    tiny_classifier(num_labels=num_labels).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = perturb(ShadowForSequenceClassification.from_base(base, ShadowConfig(**SETTINGS))).eval()
    model.save_pretrained(tmp_path / "shadow")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shadow")
    assert_same(model, loaded)
    assert (loaded.num_labels, loaded.config.num_labels) == (num_labels, num_labels)


def test_a_classifier_of_a_causal_base_needs_no_saved_classifier(base_directory, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(
        base_directory, num_labels=3, id2label={0: "no", 1: "yes", 2: "maybe"}
    )
    model = perturb(ShadowForSequenceClassification.from_base(base, ShadowConfig(**SETTINGS))).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before, after = logits(model), logits(loaded)
    assert torch.equal(before["attached"], after["attached"])
    assert torch.equal(before["detached"], after["detached"])
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_only_the_shadow_is_written(base_directory, tmp_path):
    model = made(base_directory)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", WEIGHTS}
    assert set(read_tensors(str(tmp_path))) == {f"shadow.{name}" for name in model.shadow.state_dict()}


def test_the_base_may_be_given_as_a_model_or_by_another_path(base_directory, tmp_path):
    model = made(base_directory)
    model.base.config.name_or_path = "moved/away"
    model.config.base_name_or_path = "moved/away"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot load the base moved/away: .*; pass base=... if it has moved"):
        ShadowForCausalLM.from_pretrained(tmp_path)
    assert_same(model, ShadowForCausalLM.from_pretrained(tmp_path, base=str(base_directory)))
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, base=str(base_directory)))
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path, base=base)
    assert loaded.base is base
    assert_same(model, loaded)


def test_a_base_without_a_name_must_be_given(tmp_path):
    base = tiny_base()
    ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"names no base model; pass base=..."):
        ShadowForCausalLM.from_pretrained(tmp_path)
    assert ShadowForCausalLM.from_pretrained(tmp_path, base=base).base is base


def test_a_relative_base_is_found_from_everywhere(base_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(base_directory.parent)
    made(base_directory.name).save_pretrained(tmp_path)
    monkeypatch.chdir("/")
    ShadowForCausalLM.from_pretrained(tmp_path)


def test_loading_keywords_reach_the_base(base_directory, tmp_path):
    made(base_directory).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager"
    )
    assert loaded.base.dtype == torch.bfloat16
    assert loaded.base.config._attn_implementation == "eager"
    assert loaded.shadow.backbone.config._attn_implementation == "eager"
    assert loaded.shadow.backbone.dtype == torch.float32


def test_generation_settings_travel_and_belong_to_the_pair_alone(base_directory, tmp_path):
    model = made(base_directory)
    model.generation_config.max_new_tokens = 3
    assert model.base.generation_config.max_new_tokens is None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for mode in MODES:
        assert loaded.set_mode(mode).generate(tokens(1, 4), do_sample=False).shape == (1, 7)


def test_the_pipeline_takes_the_directory(base_directory, tmp_path):
    model = made(base_directory)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert type(generate.model) is ShadowForCausalLM
    text = generate("ab cd", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("ab cd")


CHANGED_BASES = {
    "width": ({"hidden_size": 48}, r"hidden_size 32, but .* has hidden_size 48"),
    "depth": ({"num_hidden_layers": 5}, r"num_hidden_layers 4, but .* has num_hidden_layers 5"),
    "vocabulary": ({"vocab_size": 99}, r"vocab_size 97, but .* has vocab_size 99"),
    "weights": ({"seed": 1}, r"right shape but other weights .* pass check_base_weights=False"),
}


@pytest.mark.parametrize("change", CHANGED_BASES)
def test_a_wrong_base_is_refused_and_both_are_named(base_directory, tmp_path, change):
    changes, message = CHANGED_BASES[change]
    made(base_directory).save_pretrained(tmp_path / "shadow")
    tiny_base(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=message) as caught:
        ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "other"))
    assert str(base_directory) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


def test_other_weights_are_accepted_on_request(base_directory, tmp_path):
    made(base_directory).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, base=tiny_base(seed=1), check_base_weights=False)
    assert isinstance(loaded, ShadowForCausalLM)


def test_a_copy_of_the_base_in_half_precision_is_the_same_base(base_directory, tmp_path):
    made(base_directory).save_pretrained(tmp_path)
    ShadowForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    ShadowForCausalLM.from_pretrained(tmp_path, base=str(tmp_path / "half"))


def rewrite(directory, change):
    content = json.loads((directory / "config.json").read_text())
    change(content)
    (directory / "config.json").write_text(json.dumps(content))


CONFIG_FAULTS = {
    "newer": (lambda c: c.update(schema_version=2), "schema_version 2, this shadowtune reads up to 1"),
    "unknown": (lambda c: c["shadow"].update(ranc=4), r"unknown key shadow.ranc \(did you mean rank\?\)"),
    "wrong_type": (lambda c: c["shadow"].update(rank="four"), "shadow.rank must be int, got 'four'"),
    "out_of_range": (lambda c: c["shadow"].update(rank=0), "rank must be at least 1, got 0"),
    "foreign": (lambda c: c.update(model_type="llama"), "model_type 'llama', not 'shadow'"),
    "no_type": (lambda c: c.pop("model_type"), "model_type None, not 'shadow'"),
    "no_base": (lambda c: c.pop("base_config"), "base_config"),
    "no_backbone": (lambda c: c.pop("backbone_config"), "backbone_config"),
    "base_of_no_type": (lambda c: c["base_config"].pop("model_type"), "model_type"),
    "other_rank": (lambda c: c["shadow"].update(rank=5), r"shadow.boundaries.injection_downs has shape \(3, 32, 4\)"),
    "other_update": (lambda c: c["shadow"].update(update=False), "unexpected shadow.boundaries.gate_downs"),
    "more_layers": (lambda c: c["backbone_config"].update(num_hidden_layers=2), "missing shadow.backbone.layers.1"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_is_wrong_is_an_error_that_names_the_key(base_directory, tmp_path, fault):
    change, message = CONFIG_FAULTS[fault]
    made(base_directory).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        ShadowForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\x00\xff"])
def test_a_missing_or_damaged_config_is_an_error_that_names_it(base_directory, tmp_path, content):
    made(base_directory).save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json") as caught:
        ShadowForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_damaged_generation_config_is_an_error_that_names_it(base_directory, tmp_path):
    made(base_directory).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json"):
        ShadowForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    ShadowForCausalLM.from_pretrained(tmp_path)


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere"):
        ShadowForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_tensors_that_do_not_fit_are_all_named(base_directory, tmp_path):
    model = made(base_directory)
    model.save_pretrained(tmp_path)
    tensors = read_tensors(str(tmp_path))
    tensors["shadow.extra"] = torch.ones(2)
    del tensors["shadow.boundaries.norm_bias"]
    tensors["shadow.boundaries.norm_weight"] = torch.ones(5)
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        ShadowForCausalLM.from_pretrained(tmp_path)
    for part in (
        str(tmp_path),
        "missing shadow.boundaries.norm_bias",
        "unexpected shadow.extra",
        "shadow.boundaries.norm_weight has shape (5,), not (32,)",
    ):
        assert part in str(caught.value)


def test_loading_tensors_changes_nothing_unless_all_fit():
    module = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_tensors({"m": module}, {"m.weight": torch.ones(2, 2)}, "here")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    load_tensors({"m": module}, {"m.weight": torch.ones(2, 2), "m.bias": torch.ones(2)}, "here")
    assert torch.equal(module.weight, torch.ones(2, 2))


def test_config_json_says_what_the_shadow_is(base_directory, tmp_path):
    model = made(base_directory, hidden_size=16)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "shadow"
    assert content["schema_version"] == 1
    assert content["architectures"] == ["ShadowForCausalLM"]
    assert content["base_name_or_path"] == str(base_directory)
    assert len(content["base_fingerprint"]) == 16
    assert content["shadow"] == ShadowConfig(**SETTINGS, hidden_size=16).to_dict()
    assert (content["base_config"]["model_type"], content["base_config"]["hidden_size"]) == ("llama", 32)
    assert (content["backbone_config"]["model_type"], content["backbone_config"]["hidden_size"]) == ("llama", 16)
    assert content["backbone_config"]["num_hidden_layers"] == 1
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ShadowModelConfig)
    assert config.shadow_config == ShadowConfig(**SETTINGS, hidden_size=16)


def test_another_process_needs_only_the_import(base_directory, tmp_path):
    model = made(base_directory)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, shadowtune; from transformers import AutoModelForCausalLM\n"
        "torch.set_grad_enabled(False)\n"
        "ids = torch.arange(3, 12).view(1, -1)\n"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = model(torch.arange(3, 12).view(1, -1)).logits.double().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-6)
