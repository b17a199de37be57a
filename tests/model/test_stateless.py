"""The attached model whose boundaries do not read the shadow's state."""

import json

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.model.formats.conversion import convert
from shadowtune.model.initialization import measure_channel_scales, measure_input_sizes
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, perturbed_classifier, perturbed_model, tokens

STATELESS = {"variant": "stateless", "alpha": 0.003, "dropout": 0.0}


def batch(rows=2, length=9):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def count_backbone(model):
    passes = []
    model.shadow.backbone.register_forward_pre_hook(lambda *args: passes.append(1))
    return passes


def gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_at_the_start_attached_equals_base_bit_for_bit_and_later_all_modes_differ():
    torch.manual_seed(0)
    model = ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(**STATELESS, rank=4, update_width=3)).eval()
    ids = tokens(2, 9)
    found = {mode: model.set_mode(mode)(input_ids=ids).logits for mode in ("attached", "base")}
    assert torch.equal(found["attached"], found["base"])
    perturb(model)
    found = [model.set_mode(mode)(input_ids=ids).logits for mode in ("attached", "detached", "base")]
    assert min(float((one - other).abs().max()) for one, other in zip(found, found[1:] + found[:1], strict=True)) > 0.01


@pytest.mark.parametrize("channel_scaling", [False, True])
@pytest.mark.parametrize("inject_first", [False, True])
def test_what_is_measured_makes_each_input_of_size_one(channel_scaling, inject_first):
    base = tiny_base()
    settings = {**STATELESS, "channel_scaling": channel_scaling, "inject_first": inject_first}
    boundaries = ShadowForCausalLM.from_base(base, ShadowConfig(**settings)).shadow.boundaries
    first = 0 if inject_first else 1
    sizes = measure_input_sizes(base)[first:]
    assert torch.equal(boundaries.input_sizes, sizes)
    wanted = measure_channel_scales(base)[first:] if channel_scaling else torch.ones_like(boundaries.channel_scales)
    torch.testing.assert_close(boundaries.channel_scales * sizes[:, None], wanted)


@pytest.mark.parametrize("shadow_loss_weight", [0.0, 0.4])
def test_the_backbone_runs_in_training_for_its_own_loss_alone(shadow_loss_weight):
    model = perturbed_model(**STATELESS, shadow_loss_weight=shadow_loss_weight).train()
    passes = count_backbone(model)
    outputs, found = gradients(model, **batch())
    assert len(passes) == (1 if shadow_loss_weight else 0)
    assert any(name.startswith("shadow.backbone") for name in found) == (shadow_loss_weight > 0)
    assert (outputs.shadow_loss is not None) == (shadow_loss_weight > 0)
    alone = perturbed_model(**STATELESS, shadow_loss_weight=0.0).train()
    _, boundaries = gradients(alone, **batch())
    assert boundaries
    for name, gradient in boundaries.items():  # what the shadow learns is nothing to the boundaries
        torch.testing.assert_close(found[name], gradient)
        assert gradient.abs().max() > 0


def test_evaluating_with_labels_needs_it_for_its_terms_alone():
    model = perturbed_model(**STATELESS, shadow_loss_weight=0.0)
    passes = count_backbone(model)
    with torch.no_grad():
        without = model(**batch()).loss
        assert passes == []
        model.set_logit_interpolation(0.5)
        mixed = model(**batch()).loss
    assert len(passes) == 1
    assert without != mixed


@pytest.mark.parametrize(
    "settings", [{"distillation_weight": 0.3}, {"matching_weight": 0.2}, {"shadow_loss_weight": 0.3}, {"draft_rank": 3}]
)
def test_every_term_that_reads_s0_gets_it(settings):
    settings = {"shadow_loss_weight": 0.0, **settings}
    model = perturbed_model(**STATELESS, **settings).train()
    passes = count_backbone(model)
    outputs, found = gradients(model, **batch())
    assert len(passes) == 1
    assert torch.isfinite(outputs.loss)
    assert any(not name.startswith("shadow.boundaries") for name in found)


@pytest.mark.parametrize("draft_rank", [None, 3])
def test_what_no_gradient_reaches_is_frozen_on_request(draft_rank):
    model = perturbed_model(**STATELESS, shadow_loss_weight=0.0, draft_rank=draft_rank).train()
    model.freeze_unused()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients(model, **batch())[1]) == trained
    assert {name.split(".")[1] for name in trained} == {"boundaries"} | ({"draft_head"} if draft_rank else set())


@pytest.mark.parametrize("settings", [{}, {"shadow_loss_weight": 0.1, **STATELESS}])
def test_nothing_is_frozen_that_learns(settings):
    model = perturbed_model(**settings).train()
    model.freeze_unused()
    assert all(p.requires_grad for p in model.shadow.parameters())


def test_a_classifier_trains_without_its_backbone_and_freezes_the_shadows_head():
    model = perturbed_classifier(**STATELESS, shadow_loss_weight=0.0).train()
    passes = count_backbone(model)
    inputs = {"input_ids": tokens(3, 9), "labels": torch.tensor([0, 1, 2])}
    model.freeze_unused()
    _, found = gradients(model, **inputs)
    assert passes == []
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in found
    assert "shadow_score.weight" not in found
    joint = perturbed_classifier(**STATELESS, shadow_loss_weight=0.3).train()
    outputs, both = gradients(joint, **inputs)
    assert outputs.shadow_loss is not None
    for name, gradient in found.items():
        torch.testing.assert_close(both[name], gradient)


@torch.no_grad()
def test_a_classifier_answers_without_its_backbone():
    model = perturbed_classifier(**STATELESS)
    expected = model(input_ids=tokens(3, 9)).logits
    passes = count_backbone(model)
    torch.testing.assert_close(model(input_ids=tokens(3, 9)).logits, expected)
    assert passes == []
    assert not torch.allclose(model.set_mode("detached")(input_ids=tokens(3, 9)).logits, expected)
    assert len(passes) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = perturbed_model(**STATELESS, shadow_loss_weight=0.2, inject_first=True).train()
    _, expected = gradients(model, **batch())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    _, found = gradients(model, **batch())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_is_loaded_computes_what_was_saved(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig.recommended(rank=4, alpha=0.003))).eval()
    model.save_pretrained(tmp_path / "saved")
    again = ShadowForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.shadow.config == model.shadow.config
    for mode in ("attached", "detached"):
        ids = tokens(2, 7)
        assert torch.equal(again.set_mode(mode)(ids).logits, model.set_mode(mode)(ids).logits)
    plain = model.detached()
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_an_adapter_that_was_saved_before_there_were_variants_loads_as_the_papers(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(rank=4, update_width=3))).eval()
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    assert config["shadow"].pop("variant") == "paper"
    file.write_text(json.dumps(config))
    again = ShadowForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.shadow.config == model.shadow.config
    ids = tokens(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("format", ["shadow-peft", "peft"])
def test_other_libraries_cannot_hold_it_and_convert_says_so(tmp_path, format):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = ShadowForCausalLM.from_base(base, ShadowConfig(**STATELESS))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"variant='?stateless"):
        convert(str(tmp_path / "saved"), tmp_path / "theirs", format)
