import pytest
import torch

from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.methods import load_base, load_trained, make_trainable, objective_of, parameter_table
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import perturb, tokens

SHADOW = {"peft_type": "SHADOW", "r": 4, "update_hidden_size": 3, "auxiliary_loss_weight": 0.7, "shadow_dropout": 0.0}


def trained(settings, task="causal_lm", **kwargs):
    base = tiny_base() if task == "causal_lm" else tiny_classifier()
    return make_trainable(base, "peft", task, peft=settings, **kwargs)


@pytest.mark.parametrize("settings", [{"peft_type": "IA3"}, {"peft_type": "HRA", "r": 2}, SHADOW])
def test_any_adapter_of_peft_is_made_by_its_own_settings(settings):
    model = trained(settings)
    parts = {part: count for part, _, count in parameter_table(model)}
    assert parts["base"] == 0
    assert parts["adapters"] > 0


def test_trained_parameters_have_the_dtype_asked_for():
    model = trained({"peft_type": "HRA", "r": 2}, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "SHADW"}, r"peft.peft_type 'SHADW' is unknown to PEFT \(did you mean SHADOW\?\)"),
        ({"r": 3}, "peft.peft_type None is unknown"),
        ({"peft_type": "SHADOW", "rank": 3}, "PEFT's SHADOW has no setting peft.rank"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "puts tokens before the prompt"),
        (
            {"peft_type": "LORA", "r": 2, "layers_pattern": "x", "target_modules": "a"},
            "peft: LORA refuses its settings",
        ),
    ],
)
def test_what_peft_does_not_have_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        trained(settings)
    assert "\n" not in str(caught.value)


def test_the_auxiliary_loss_of_pefts_shadow_is_trained():
    model = perturb(trained(SHADOW), scale=0.1).eval()
    ids = tokens(2, 7)
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    loss = objective_of("peft", "causal_lm", "SHADOW")(model, inputs, None)["loss"]
    auxiliary = model.base_model.last_shadow_loss
    plain = objective_of("lora", "causal_lm")(model, inputs, None)["loss"]
    assert auxiliary > 1
    torch.testing.assert_close(loss, plain + 0.7 * auxiliary)


def test_a_micro_batch_counts_by_its_share_of_the_step():
    model = perturb(trained({"peft_type": "IA3"}, "classification"), scale=0.1).eval()
    inputs = {"input_ids": tokens(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    objective = objective_of("peft", "classification")
    whole = objective(model, inputs, 4)["loss"]
    halves = [objective(model, {k: v[part] for k, v in inputs.items()}, 4)["loss"] for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(sum(halves), whole)


def test_a_trained_shadow_of_peft_is_opened_as_a_shadow_with_the_same_outputs(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = perturb(make_trainable(load_base(str(tmp_path / "base")), "peft", peft=SHADOW), scale=0.1).eval()
    model.save_pretrained(tmp_path / "model")
    opened = load_trained(tmp_path / "model", "peft", "causal_lm", str(tmp_path / "base"))
    assert isinstance(opened, ShadowForCausalLM)
    ids = tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        base = tiny_base()(input_ids=ids).logits
        opened.set_mode("detached")
        assert not torch.allclose(opened(input_ids=ids).logits, base, atol=1e-2)


def test_other_adapters_are_opened_by_peft(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = make_trainable(load_base(str(tmp_path / "base")), "peft", peft={"peft_type": "HRA", "r": 2})
    perturb(model, scale=0.3).eval().save_pretrained(tmp_path / "model")
    opened = load_trained(tmp_path / "model", "peft", "causal_lm", str(tmp_path / "base"))
    ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_without_a_config_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read adapter_config.json of .*model"):
        load_trained(tmp_path / "model", "peft", "causal_lm", "any")
