import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.model.formats.conversion import convert
from shadowtune.model.initialization import MAX_SCALE, measure_channel_scales
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens

SETTINGS = {"rank": 4, "update_width": 3, "alpha": 0.7, "dropout": 0.0, "channel_scaling": True}


def inputs_of_blocks(base):
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].float()))
        for layer in base.model.layers
    ]
    base(input_ids=torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()
    return seen


def with_a_large_channel():
    base = tiny_base()
    with torch.no_grad():
        base.get_input_embeddings().weight[:, 5] += 8.0
    return base


@torch.no_grad()
def test_scaled_channels_are_alike_and_the_whole_is_as_large_as_before():
    base = with_a_large_channel()
    scales, seen = measure_channel_scales(base), inputs_of_blocks(base)
    assert scales.shape == (len(seen), base.config.hidden_size)
    for c, x in zip(scales, seen, strict=True):
        sizes = (c * x).pow(2).mean((0, 1)).sqrt()
        assert c[5] == c.min()
        assert float(sizes.max() / sizes.min()) < 1.01
        torch.testing.assert_close((c * x).pow(2).mean(), x.pow(2).mean())


def test_a_channel_that_is_never_used_is_not_blown_up():
    base = tiny_base()
    with torch.no_grad():
        base.get_input_embeddings().weight[:, 2] = 0.0
        scales = measure_channel_scales(base)[0]
    assert scales[2] == scales.max()
    assert scales[2] / scales.median() < 2 * MAX_SCALE


def test_measuring_leaves_the_base_as_it_was():
    base = tiny_base().train()
    measure_channel_scales(base)
    assert base.training
    assert not any(layer._forward_pre_hooks for layer in base.model.layers)


@pytest.mark.parametrize(("settings", "first"), [({}, 1), ({"inject_first": True}, 0), ({"injection_start": 0.5}, 2)])
def test_each_boundary_has_the_scales_of_the_block_that_it_leads_into(settings, first):
    base = with_a_large_channel()
    model = ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS, **settings))
    expected = measure_channel_scales(base)[first:]
    assert torch.equal(model.shadow.boundaries.channel_scales, expected)


def test_a_base_without_weights_gives_the_shapes_alone():
    with torch.device("meta"):
        base = tiny_base()
        model = ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS))
    assert model.shadow.boundaries.channel_scales.shape == (base.config.num_hidden_layers - 1, base.config.hidden_size)


def test_scales_are_a_part_of_w_down_and_nothing_that_is_trained(tmp_path):
    model = perturb(ShadowForCausalLM.from_base(with_a_large_channel(), ShadowConfig(**SETTINGS)))
    ids = tokens(2, 7)
    expected = model(input_ids=ids).logits
    assert "channel_scales" not in dict(model.shadow.boundaries.named_parameters())
    model.save_pretrained(tmp_path)
    again = ShadowForCausalLM.from_pretrained(tmp_path, base=model.base)
    assert torch.equal(again(input_ids=ids).logits, expected)
    boundaries = model.shadow.boundaries
    with torch.no_grad():
        boundaries.injection_downs *= boundaries.channel_scales[:, :, None]
        boundaries.channel_scales.fill_(1.0)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["shadow-peft", "peft"])
def test_other_libraries_get_them_inside_w_down(tmp_path, format):
    settings = dict(SETTINGS)
    if format == "peft":
        settings |= {"update_norm": False, "update_bias": True, "activation": "gelu", "inject_first": True}
        settings |= {"dropout_position": "hidden", "transform_dropout": False}
    base = with_a_large_channel()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**settings)))
    model.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", format)
    again = ShadowForCausalLM.from_pretrained(tmp_path / "theirs", base=base)
    ids = tokens(2, 7)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
