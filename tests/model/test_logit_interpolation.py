import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.attach import attach
from shadowtune.errors import ConfigError
from shadowtune.model.formats.conversion import convert
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens

SETTINGS = {"rank": 4, "update_width": 3, "alpha": 0.7, "dropout": 0.0}
GAMMA = 0.6


def mixing_and_not(**settings):
    """The same shadow on the same base, with a gamma and without."""
    torch.manual_seed(0)
    plain = perturb(ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(**SETTINGS, **settings)))
    mixing = ShadowForCausalLM.from_base(plain.base, ShadowConfig(**SETTINGS, **settings, logit_interpolation=GAMMA))
    mixing.shadow.load_state_dict(plain.shadow.state_dict(), strict=False)
    return mixing.eval(), plain.eval()


@torch.no_grad()
def test_the_logits_are_those_of_the_attached_model_and_gamma_times_the_shadows_own():
    mixing, plain = mixing_and_not()
    ids = tokens(2, 11)
    apart = plain(ids).logits + GAMMA * plain.set_mode("detached")(ids).logits
    torch.testing.assert_close(mixing(ids).logits, apart)
    assert (apart - plain.set_mode("attached")(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_the_other_modes_know_nothing_of_it():
    (mixing, plain), ids = mixing_and_not(), tokens(2, 11)
    for mode in ("base", "detached"):
        torch.testing.assert_close(mixing.set_mode(mode)(ids).logits, plain.set_mode(mode)(ids).logits)
    torch.testing.assert_close(mixing.detached()(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_attach_mixes_too():
    mixing, _ = mixing_and_not()
    expected = mixing(tokens(2, 11)).logits
    with attach(mixing.base, mixing.shadow):
        torch.testing.assert_close(mixing.base(tokens(2, 11)).logits, expected)


def test_in_training_each_learns_for_itself():
    mixing, plain = mixing_and_not(shadow_loss_weight=1.0)
    ids, gradients = tokens(2, 11), []
    for model in (mixing, plain):
        model.train()(ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in model.shadow.named_parameters() if each.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


@torch.no_grad()
def test_the_loss_outside_of_training_is_that_of_the_mixed_logits():
    mixing, _ = mixing_and_not()
    ids = tokens(2, 11)
    output = mixing(ids, labels=ids)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.base_loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@torch.no_grad()
def test_a_bfloat16_base_is_handed_its_own_precision():
    base = tiny_base().to(torch.bfloat16)
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS, logit_interpolation=GAMMA))).eval()
    output, _ = model.encode(tokens(2, 11))
    assert output.last_hidden_state.dtype == torch.bfloat16


@torch.no_grad()
def test_speculation_says_the_same():
    mixing, _ = mixing_and_not()
    prompt = tokens(1, 9)
    plain = mixing.generate(prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(mixing.generate(prompt, max_new_tokens=24, do_sample=False, speculate=4), plain)


@torch.no_grad()
def test_it_is_saved(tmp_path):
    mixing, _ = mixing_and_not()
    mixing.save_pretrained(tmp_path)
    again = ShadowForCausalLM.from_pretrained(tmp_path, base=mixing.base).eval()
    torch.testing.assert_close(again(tokens(2, 11)).logits, mixing(tokens(2, 11)).logits)


@pytest.mark.parametrize("format", ["shadow-peft", "peft"])
def test_no_third_party_format_can_hold_it(tmp_path, format):
    mixing, _ = mixing_and_not()
    mixing.save_pretrained(tmp_path / "ours")
    mixing.base.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"logit_interpolation=0\.6 \(it has None\)"):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", format, base=str(tmp_path / "base"))
