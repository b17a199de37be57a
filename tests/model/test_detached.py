import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import ShadowtuneError
from tests.support.bases import CONFIGS, tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens

NARROW = {  # sizes of a mirror of half the width; those without a field for the number of heads or their width differ
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_shadow_layers": 2,
}


@torch.no_grad()
def assert_plain_equals_detached(model, plain, ids):
    assert not plain.training
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.set_mode("detached")(ids, attention_mask=mask).logits
    found = plain(ids, attention_mask=mask).logits
    kept = mask.bool() if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert (model.set_mode("base")(ids).logits - expected).abs().max() > 1e-2
    model.set_mode("attached")


@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["same_width", "other_width"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plain_model_equals_detached_mode(kind, sizes):
    model = perturbed_model(kind, **sizes)
    plain = model.detached()
    assert plain.config.model_type == kind
    assert type(plain) is type(model.base)
    assert plain.config.num_hidden_layers == sizes.get("num_shadow_layers", 1)
    assert plain.get_input_embeddings().weight.shape == (97, sizes.get("hidden_size", 32))
    assert_plain_equals_detached(model, plain, tokens(2, 20))
    expected = model.set_mode("detached").generate(tokens(2, 9), max_new_tokens=12, do_sample=False)
    assert torch.equal(plain.generate(tokens(2, 9), max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize(
    ("base_kind", "backbone_kind", "width"),
    [
        ("llama", "qwen2", 32),
        ("llama", "opt", 16),
        ("gpt2", "llama", 16),
        ("gemma2", "gemma2", 16),
        ("granite", "granite", 32),
    ],
)
def test_a_pretrained_backbone_detaches_into_its_own_architecture(tmp_path, base_kind, backbone_kind, width):
    sizes = {"num_hidden_layers": 2, "hidden_size": width}
    if backbone_kind == "opt":
        sizes["word_embed_proj_dim"] = width
    other = {"gemma2": {"final_logit_softcapping": 7.0}, "granite": {"logits_scaling": 2.0}}
    tiny_base(backbone_kind, seed=5, **sizes, **other.get(backbone_kind, {})).save_pretrained(tmp_path)
    model = perturbed_model(base_kind, backbone=str(tmp_path))
    plain = model.detached()
    assert plain.config.model_type == backbone_kind
    assert_plain_equals_detached(model, plain, tokens(2, 20))


@torch.no_grad()
def test_a_pretrained_backbone_sees_what_it_saw_alone(tmp_path):
    alone = tiny_base("gemma2", seed=5, hidden_size=16)
    alone.save_pretrained(tmp_path)
    config = ShadowConfig(backbone=str(tmp_path))
    shadow = ShadowForCausalLM.from_base(tiny_base("llama"), config).eval().shadow
    ids = tokens(2, 9)
    states = shadow.backbone(inputs_embeds=shadow.embedding(ids)).last_hidden_state
    torch.testing.assert_close(states, alone.model(ids).last_hidden_state, rtol=0, atol=1e-6)


def test_architectures_that_treat_logits_differently_have_no_plain_form(tmp_path):
    tiny_base("llama", seed=5).save_pretrained(tmp_path)
    model = perturbed_model("gemma2", backbone=str(tmp_path))
    with pytest.raises(ShadowtuneError, match="a llama shadow of a gemma2 base has no plain form"):
        model.detached()


@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["same_width", "other_width"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_detached_classifier_equals_detached_mode(kind, sizes):
    base = tiny_classifier(kind)
    base.config.problem_type = "multi_label_classification"
    config = ShadowConfig(rank=4, update_width=3, **sizes)
    model = perturb(ShadowForSequenceClassification.from_base(base, config)).eval()
    with torch.no_grad():
        model.shadow_score.weight.mul_(-1)
    plain = model.detached()
    assert (plain.config.num_labels, plain.config.problem_type) == (3, "multi_label_classification")
    ids = tokens(2, 9)
    ids[1, 6:] = 0
    expected = model.set_mode("detached")(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)
    assert (model.set_mode("attached")(ids).logits - expected).abs().max() > 1e-2


def test_the_plain_model_shares_no_memory_and_no_settings():
    model = perturbed_model()
    plain = model.detached()
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in plain.parameters())
    assert plain.generation_config is not model.base.generation_config
    assert plain.config is not model.shadow.backbone.config
    assert plain.config.name_or_path == ""
    assert all(not hook for module in plain.modules() for hook in (module._forward_hooks, module._forward_pre_hooks))


def test_a_tied_head_is_untied_for_the_plain_model():
    base = tiny_base(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(hidden_size=16))).eval()
    plain = model.detached()
    assert not plain.config.tie_word_embeddings
    assert_plain_equals_detached(model, plain, tokens(2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_the_shadows(dtype):
    base = tiny_base().to(torch.bfloat16)
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(hidden_size=16), dtype=dtype)).eval()
    plain = model.detached()
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        expected = model.set_mode("detached")(tokens(2, 9)).logits.float()
        torch.testing.assert_close(
            plain(tokens(2, 9)).logits.float(), expected, rtol=0, atol=0.05 * expected.std().item()
        )


def test_saved_it_loads_without_this_library(tmp_path):
    model = perturbed_model(**NARROW)
    plain = model.detached()
    plain.save_pretrained(tmp_path / "causal")
    classifier = perturb(ShadowForSequenceClassification.from_base(tiny_classifier(), ShadowConfig(**NARROW))).eval()
    classifier.detached().save_pretrained(tmp_path / "classifier")
    code = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM as Causal, AutoModelForSequenceClassification as Classifier\n"
        "ids, directory = torch.arange(3, 12).view(1, -1), sys.argv[1]\n"
        "causal = Causal.from_pretrained(directory + '/causal')(ids).logits[0, -1].tolist()\n"
        "classes = Classifier.from_pretrained(directory + '/classifier')(ids).logits[0].tolist()\n"
        "assert 'shadowtune' not in sys.modules\n"
        "print(json.dumps([causal, classes]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    causal, classes = json.loads(done.stdout.splitlines()[-1])
    ids = torch.arange(3, 12).view(1, -1)
    with torch.no_grad():
        expected = model.set_mode("detached")(ids).logits[0, -1], classifier.set_mode("detached")(ids).logits[0]
    torch.testing.assert_close(torch.tensor(causal), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(classes), expected[1], rtol=0, atol=1e-5)
    assert "shadow" not in json.dumps(AutoConfig.from_pretrained(tmp_path / "causal").to_dict())
    for auto, part in ((AutoModelForCausalLM, "causal"), (AutoModelForSequenceClassification, "classifier")):
        loaded, report = auto.from_pretrained(tmp_path / part, output_loading_info=True)
        assert not loaded.training
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
