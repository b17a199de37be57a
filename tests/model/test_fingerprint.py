import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.errors import CheckpointError
from shadowtune.model import fingerprint
from shadowtune.model.fingerprint import CheckpointCheck, base_fingerprint, base_signature, has_signature
from tests.support.bases import tiny_base, tiny_classifier


def test_equal_weights_have_equal_fingerprints_and_others_do_not():
    assert base_fingerprint(tiny_base()) == base_fingerprint(tiny_base())
    assert base_fingerprint(tiny_base()) != base_fingerprint(tiny_base(seed=1))
    assert base_fingerprint(tiny_base()) != base_fingerprint(tiny_base(num_hidden_layers=3))


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "layers.3.self_attn.q_proj.weight", "norm.weight"])
def test_a_change_of_any_one_weight_shows(name):
    base = tiny_base()
    before = base_fingerprint(base)
    with torch.no_grad():
        base.model.get_parameter(name).mul_(1.5)
    assert base_fingerprint(base) != before


def test_precision_and_task_do_not_matter():
    base = tiny_base()
    before = base_fingerprint(base)
    classifier = tiny_classifier(num_labels=2)
    classifier.model.load_state_dict(base.model.state_dict())
    assert base_fingerprint(classifier) == before
    assert base_fingerprint(base.to(torch.bfloat16)) == before


def test_a_shadow_does_not_matter():
    base = tiny_base()
    before = base_fingerprint(base)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    assert base_fingerprint(base) == before == model.config.base_fingerprint
    with attach(base, model.shadow):
        assert base_fingerprint(base) == before


def test_what_has_no_weights_of_its_own_has_no_fingerprint():
    base = tiny_base()
    base.config.quantization_config = {"quant_method": "torchao"}
    assert base_fingerprint(base) is None
    assert base_fingerprint(tiny_base().to("meta")) is None


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("saved_in", DTYPES, ids=str)
@pytest.mark.parametrize("loaded_in", DTYPES, ids=str)
def test_a_signature_survives_every_precision_and_no_other_weights(saved_in, loaded_in):
    signature = json.loads(json.dumps(base_signature(tiny_base().to(saved_in))))
    assert has_signature(tiny_base().to(loaded_in), signature)
    assert has_signature(tiny_base().to(saved_in).to(loaded_in), signature)
    assert not has_signature(tiny_base(seed=1).to(loaded_in), signature)
    for name in ("layers.0.mlp.up_proj.weight", "layers.3.self_attn.q_proj.weight", "norm.weight"):
        other = tiny_base()
        other.model.get_parameter(name).data.mul_(1.5)
        assert not has_signature(other.to(loaded_in), signature), name


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_in_one_precision_an_edit_of_any_single_number_shows(name):
    base = tiny_base()
    signature, weight = base_signature(base), base.get_parameter(name)
    for index in (0, 333, weight.numel() - 1):
        before = weight.data.view(-1)[index].clone()
        weight.data.view(-1)[index] += 1e-6 + before.abs() * 1e-6
        assert not has_signature(base, signature)
        weight.data.view(-1)[index] = before
    weight.data[[3, 4]] = weight.data[[4, 3]]  # the same numbers elsewhere
    assert not has_signature(base, signature)
    weight.data[[3, 4]] = weight.data[[4, 3]]
    assert has_signature(base, signature)


def test_a_signature_knows_weights_of_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(fingerprint, "COLUMNS", 24)
    monkeypatch.setattr(fingerprint, "ROWS_AT_ONCE", 3)
    base = tiny_base()
    signature = base_signature(base)
    assert has_signature(tiny_base().to(torch.float16), signature)
    base.model.embed_tokens.weight.data[90] *= 1.01
    assert not has_signature(base, signature)


def test_the_signature_of_a_classifier_and_of_a_language_model_of_one_body_agree():
    for dtype in DTYPES:
        base, classifier = tiny_base(), tiny_classifier(num_labels=2)
        classifier.model.load_state_dict(base.model.state_dict())
        signatures = base_signature(base), base_signature(classifier)
        assert has_signature(classifier.to(dtype), signatures[0])
        assert has_signature(base.to(dtype), signatures[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_shadow_trained_beside_float32_is_deployed_beside_16_bits(tmp_path, dtype):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    ShadowForCausalLM.from_base(base, ShadowConfig(rank=2)).save_pretrained(tmp_path / "shadow")
    assert ShadowForCausalLM.from_pretrained(tmp_path / "shadow", dtype=dtype).base.dtype == dtype
    base.lm_head.weight.data[5] = 0
    with pytest.raises(CheckpointError, match="other weights"):
        ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=base)


def test_an_adapter_saved_before_there_were_signatures_still_knows_its_base(tmp_path):
    base = tiny_base()
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    model.config.base_signature = None
    model.save_pretrained(tmp_path)
    ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())
    ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base().to(torch.float16))
    with pytest.raises(CheckpointError, match="other weights"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base(seed=1))


def checkpoint(base):
    """The tensors of a base's checkpoint, by their names in it."""
    return list(base.state_dict().items())


def checked(tensors, base, dtype=None, signature=True):
    """Read tensors with the check against a base; return it."""
    own = base if dtype is None else copy.deepcopy(base).to(dtype)
    check = CheckpointCheck(base.config, base_signature(own) if signature else None, base_fingerprint(own))
    assert [name for name, _ in check.watch(tensors)] == [name for name, _ in tensors]
    return check


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("signature", [True, False])
def test_a_checkpoint_is_recognized_by_its_tensors_in_any_order(kind, signature):
    base = tiny_base(kind)
    check = checked(checkpoint(base)[::-1], base, signature=signature)
    assert check.agrees() and not check.unseen
    assert not checked(checkpoint(tiny_base(kind, seed=1)), base, signature=signature).agrees()
    assert not checked(checkpoint(tiny_base(kind, vocab_size=98)), base, signature=signature).agrees()


@pytest.mark.parametrize("saved_in", DTYPES, ids=str)
@pytest.mark.parametrize("stored_in", DTYPES, ids=str)
def test_a_checkpoint_of_another_precision_is_recognized(saved_in, stored_in):
    base = tiny_base()
    assert checked(checkpoint(copy.deepcopy(base).to(stored_in)), base, saved_in).agrees()
    for name in ("layers.0.mlp.up_proj.weight", "norm.weight"):
        other = tiny_base()
        other.model.get_parameter(name).data.mul_(1.5)
        assert not checked(checkpoint(other.to(stored_in)), base, saved_in).agrees(), name


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_an_edit_of_one_number_of_a_checkpoint_shows(name):
    base, other = tiny_base(), tiny_base()
    other.get_parameter(name).data[3, 3] += 1e-5
    assert checked(checkpoint(base), base).agrees() and not checked(checkpoint(other), base).agrees()


def test_of_experts_that_are_stored_one_by_one_the_other_weights_are_compared(tmp_path):
    base = tiny_base("mixtral")
    base.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    check = checked(list(stored.items()), base)
    assert check.agrees() and all("mlp" in name for name in check.unseen) and check.unseen
    stored["model.layers.1.self_attn.q_proj.weight"] *= 1.5
    assert not checked(list(stored.items()), base).agrees()
