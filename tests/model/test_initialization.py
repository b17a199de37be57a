import dataclasses
import logging
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model import initialization
from shadowtune.model.backbone import load_pretrained_backbone
from shadowtune.model.configuration import Initialization
from tests.support.bases import CONFIGS, tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens

NARROW = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20}
LAYERS = {"qwen3_next": (3,)}


def started(base=None, **settings):
    torch.manual_seed(3)
    return ShadowForCausalLM.from_base(tiny_base() if base is None else base, ShadowConfig(rank=4, **settings))


@torch.no_grad()
def detached_logits(model, ids=None):
    return model.set_mode("detached")(tokens(2, 9) if ids is None else ids).logits


@torch.no_grad()
def block_calls(model, blocks, **inputs):
    """What each of the blocks is given and makes."""
    seen = []
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out)),
            with_kwargs=True,
        )
        for block in blocks
    ]
    model(use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return seen


def blocks_of(decoder):
    return next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_copied_block_makes_of_the_same_input_what_the_bases_block_makes(kind, layer):
    layer = -1 if kind == "qwen3_next" else layer
    base = tiny_base(kind)
    decoder = base.get_decoder()
    given, made = block_calls(base, blocks_of(decoder), input_ids=tokens(2, 40))[layer]
    backbone = started(base, init_layers=[layer]).shadow.backbone
    embeds = given
    if kind in ("gpt2", "opt"):  # learned positions are added to what the backbone is given
        embeds = given - (decoder.wpe.weight[:40] if kind == "gpt2" else decoder.embed_positions.weight[2:42])
    if kind == "granite":
        embeds = given / base.config.embedding_multiplier
    ((_, copied),) = block_calls(backbone, blocks_of(backbone), inputs_embeds=embeds)
    torch.testing.assert_close(copied, made, rtol=1e-5, atol=1e-5)
    assert (made - given).abs().max() > 0.01


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_with_every_block_copied_the_detached_shadow_is_the_base(kind):
    base = tiny_base(kind)
    layers = LAYERS.get(kind, (0, 1, 2, 3))
    model = started(base, init_layers=layers)
    assert model.shadow.num_cache_layers == len(layers)
    if kind not in LAYERS:
        expected = base(tokens(2, 40)).logits
        torch.testing.assert_close(detached_logits(model, tokens(2, 40)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_are_copied_in_the_given_order_and_negative_ones_count_from_the_end():
    base = tiny_base()
    model = started(base, init_layers=[-1, 1])
    for i, layer in enumerate((3, 1)):
        copy, original = model.shadow.backbone.layers[i].state_dict(), base.model.layers[layer].state_dict()
        assert all(torch.equal(copy[name], original[name]) for name in original)
    assert model.config.start == Initialization("base_layers", layers=(3, 1))
    copied = model.shadow.backbone.layers[0].mlp.up_proj.weight
    copied.add_(1)
    assert not torch.equal(copied, base.model.layers[3].mlp.up_proj.weight)


def test_copies_of_a_bfloat16_base_are_exact_in_the_shadows_precision():
    base = tiny_base().to(torch.bfloat16)
    backbone = started(base, init_layers=[2], **NARROW).shadow.backbone
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}
    backbone = started(base, init_layers=[2]).shadow.backbone
    weight = base.model.layers[2].mlp.up_proj.weight
    assert torch.equal(backbone.layers[0].mlp.up_proj.weight, weight.float())


def test_a_narrow_copy_selects_its_channels_on_the_way_in_and_out():
    base = tiny_base()
    shadow = started(base, init_layers=[1], **NARROW).shadow
    selection = shadow.input_projection.weight
    kept = selection.argmax(1)
    assert torch.equal(selection, torch.eye(32)[kept])
    assert torch.equal(shadow.projection.weight, selection.T)
    assert torch.equal(shadow.backbone.norm.weight, base.model.norm.weight[kept])
    assert torch.equal(
        shadow.backbone.layers[0].input_layernorm.weight, base.model.layers[1].input_layernorm.weight[kept]
    )


def test_learned_positions_are_narrowed_with_the_copy():
    base = tiny_base("opt")
    shadow = started(base, init_layers=[1], hidden_size=16, num_attention_heads=2).shadow
    kept = shadow.input_projection.weight.argmax(1)
    positions = base.get_decoder().embed_positions.weight
    assert torch.equal(shadow.backbone.embed_positions.weight, positions[:, kept])


def saved_pretrained(directory, base=None, weight=None, kind="qwen2", **sizes):
    """A small pretrained model in a directory; its head is that of the base behind ``weight``, if that is given."""
    model = tiny_base(
        kind, seed=5, **{"num_hidden_layers": 2, "hidden_size": 16, "tie_word_embeddings": False, **sizes}
    )
    if weight is not None:
        with torch.no_grad():
            model.lm_head.weight.copy_(base.lm_head.weight @ weight)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def test_a_pretrained_start_is_the_small_model_itself_where_the_bases_head_can_express_it(tmp_path, caplog):
    base, weight = tiny_base(), torch.randn(32, 16, generator=torch.Generator().manual_seed(7))
    small = saved_pretrained(tmp_path, base, weight)
    with caplog.at_level(logging.INFO):
        model = started(base, backbone=str(tmp_path))
    torch.testing.assert_close(detached_logits(model), small(tokens(2, 9)).logits, rtol=1e-4, atol=1e-4)
    assert model.config.start.projection == "least_squares"
    assert model.config.start.projection_error < 1e-5
    assert f"from the pretrained model {tmp_path}, projection: least squares, relative error" in caplog.text


@torch.no_grad()
def test_a_pretrained_start_reports_the_error_of_its_projection(tmp_path):
    base = tiny_base()
    small = saved_pretrained(tmp_path)
    model = started(base, backbone=str(tmp_path))
    weight = model.shadow.projection.weight
    difference = base.lm_head.weight @ weight - small.lm_head.weight
    expected = (difference.norm() / small.lm_head.weight.norm()).item()
    assert 0.5 < expected < 1
    assert model.config.start.projection_error == pytest.approx(expected, rel=1e-5)
    best = torch.linalg.lstsq(base.lm_head.weight.double(), small.lm_head.weight.double()).solution
    torch.testing.assert_close(weight, best.float())


@pytest.mark.parametrize(("base_kind", "kind"), [("granite", "llama"), ("llama", "granite"), ("granite", "granite")])
@torch.no_grad()
def test_logits_that_are_scaled_after_the_head_are_matched_too(tmp_path, base_kind, kind):
    base, weight = tiny_base(base_kind), torch.randn(32, 16, generator=torch.Generator().manual_seed(7))
    small = saved_pretrained(tmp_path, base, weight, kind)
    model = started(base, backbone=str(tmp_path))
    torch.testing.assert_close(detached_logits(model), small(tokens(2, 9)).logits, rtol=1e-4, atol=1e-4)


def test_a_pretrained_model_of_the_bases_width_has_no_projection_but_an_error(tmp_path):
    base = tiny_base()
    small = saved_pretrained(tmp_path, hidden_size=32)
    start = started(base, backbone=str(tmp_path)).config.start
    expected = (base.lm_head.weight - small.lm_head.weight).norm() / small.lm_head.weight.norm()
    assert start.projection == "none"
    assert start.projection_error == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_fits_the_projection_to_its_embedding_if_that_was_its_head(tmp_path, tied):
    small = saved_pretrained(tmp_path)
    base = tiny_classifier(tie_word_embeddings=tied)
    model = ShadowForSequenceClassification.from_base(base, ShadowConfig(backbone=str(tmp_path)))
    assert model.config.start.projection == ("least_squares" if tied else "random")
    if tied:
        best = torch.linalg.lstsq(base.model.embed_tokens.weight.double(), small.lm_head.weight.double()).solution
        torch.testing.assert_close(model.shadow.projection.weight, best.float())


@pytest.mark.parametrize("head", [True, False])
def test_a_source_with_a_projection_of_its_own_keeps_it(tmp_path, monkeypatch, head):
    base, weight = tiny_base(), torch.randn(32, 16, generator=torch.Generator().manual_seed(7))
    saved_pretrained(tmp_path)

    def load(*args):
        source = load_pretrained_backbone(*args)
        own = base.lm_head.weight.detach() @ weight if head else None
        return dataclasses.replace(source, projection=weight, head=own)

    monkeypatch.setattr(initialization, "load_pretrained_backbone", load)
    model = started(base, backbone=str(tmp_path))
    assert torch.equal(model.shadow.projection.weight, weight)
    assert model.config.start.projection == "copied"
    assert (model.config.start.projection_error or 0) < 1e-6
    assert (model.config.start.projection_error is not None) == head


def source_directory(directory, **settings):
    """An earlier shadow that has learned something, saved beside its base."""
    model = perturbed_model(**settings)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("settings", [{}, NARROW, {"num_shadow_layers": 2}, {"init_layers": (2,)}], ids=str)
def test_a_start_from_an_earlier_shadow_has_its_detached_logits_and_new_boundaries(tmp_path, settings):
    source = source_directory(tmp_path, **settings)
    mirror = {name: value for name, value in settings.items() if name != "init_layers"}
    model = started(init_from=str(tmp_path), **mirror)
    assert torch.equal(detached_logits(model), detached_logits(source))
    assert not model.shadow.boundaries.injection_ups.any()
    copied = "copied" if settings is NARROW else "none"
    assert model.config.start == Initialization("detached", str(tmp_path), projection=copied)


def test_a_windowed_block_stays_windowed_in_later_shadows(tmp_path):
    source_directory(tmp_path, model_type="gemma3_text", init_layers=(0,))
    model = started(tiny_base("gemma3_text"), init_from=str(tmp_path))
    assert model.shadow.backbone.config.layer_types == ["sliding_attention"]


def test_an_earlier_shadow_of_a_pretrained_backbone_brings_its_embedding(tmp_path):
    saved_pretrained(tmp_path / "small")
    source = source_directory(tmp_path / "source", backbone=str(tmp_path / "small"))
    shutil.rmtree(tmp_path / "small")
    model = started(init_from=str(tmp_path / "source"), backbone=str(tmp_path / "small"))
    assert torch.equal(detached_logits(model), detached_logits(source))


def test_an_earlier_classifier_starts_a_language_model(tmp_path):
    source = ShadowForSequenceClassification.from_base(tiny_classifier(), ShadowConfig(rank=4))
    perturb(source).save_pretrained(tmp_path)
    model = started(init_from=str(tmp_path))
    for name, tensor in source.shadow.backbone.state_dict().items():
        assert torch.equal(model.shadow.backbone.state_dict()[name], tensor), name


def test_a_start_from_a_plain_detached_shadow_has_its_logits(tmp_path):
    source = perturbed_model()
    source.detached().save_pretrained(tmp_path)
    model = started(init_from=str(tmp_path))
    torch.testing.assert_close(detached_logits(model), detached_logits(source))
    assert model.shadow.embedding is None


def test_a_projected_detached_shadow_starts_a_backbone_with_an_embedding_of_its_own(tmp_path):
    source = perturbed_model(**NARROW)
    source.detached().save_pretrained(tmp_path)
    model = started(backbone=str(tmp_path))
    assert model.config.start.projection_error < 1e-5
    torch.testing.assert_close(detached_logits(model), detached_logits(source), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"hidden_size 16, the base's is 32, so its projection is folded.*backbone: "):
        started(init_from=str(tmp_path), **NARROW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_shadow_layers": 2}, "num_shadow_layers 1, this shadow's mirror 2; set shadow.num_shadow_layers: 1"),
        ({"hidden_size": 16}, "hidden_size 32, this shadow's mirror 16; set shadow.hidden_size: 32"),
        ({"intermediate_size": 20}, "intermediate_size 48, this shadow's mirror 20"),
        ({"num_attention_heads": 2}, "num_attention_heads 4, this shadow's mirror 2"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 2, this shadow's mirror 1"),
        ({"head_dim": 4}, "head_dim 8, this shadow's mirror 4"),
        ({"backbone": "some/model"}, "its backbone is 'mirror', this shadow's 'some/model'; set backbone: mirror"),
    ],
)
def test_an_earlier_shadow_of_other_sizes_is_an_error_with_both(tmp_path, settings, message):
    source_directory(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        started(init_from=str(tmp_path), **settings)
    assert str(tmp_path) in str(caught.value)


def test_earlier_shadows_that_cannot_be_used_are_errors(tmp_path, caplog):
    source = source_directory(tmp_path / "a")
    with pytest.raises(ConfigError, match="its base has hidden_size 32, this one 64"):
        started(tiny_base(hidden_size=64), init_from=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="its backbone is a llama, the mirror of this base a mistral"):
        started(tiny_base("mistral"), init_from=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"cannot read config.json of init_from .*none.*RUN/model"):
        started(init_from=str(tmp_path / "none"))
    source.detached().save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="another token embedding than the base; write backbone: "):
        started(tiny_base(seed=8), init_from=str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="is a plain model, but backbone is 'x'; write backbone: "):
        started(init_from=str(tmp_path / "plain"), backbone="x")
    with pytest.raises(ConfigError, match="num_shadow_layers 1, this shadow's mirror 2"):
        started(init_from=str(tmp_path / "plain"), num_shadow_layers=2)
    assert not caplog.records
    started(tiny_base(seed=8), init_from=str(tmp_path / "a"))
    assert "was trained beside another base" in caplog.text
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors"):
        started(init_from=str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("llama", [4], r"init_layers names block 4, but the base has 4: 0 to 3, or -4 to -1"),
        ("llama", [0, -5], r"init_layers names block -5"),
        ("qwen3_next", [0], "names block 0, a linear_attention block of qwen3_next.*full_attention blocks are 3"),
    ],
)
def test_blocks_that_cannot_be_copied_are_an_error(kind, layers, message):
    with pytest.raises(ConfigError, match=message):
        started(tiny_base(kind), init_layers=layers)


def test_a_dense_block_among_experts_is_an_error():
    base = tiny_base("qwen3_moe", mlp_only_layers=[2])
    with pytest.raises(ConfigError, match="init_layers names block 2, which is built otherwise"):
        started(base, init_layers=[2])


@pytest.mark.parametrize("stored", ["int8", "offloaded", "torchao"])
def test_a_quantized_base_is_refused_where_its_numbers_are_needed(tmp_path, stored):
    base = tiny_base()
    up, head = base.model.layers[1].mlp.up_proj, base.lm_head
    if stored == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    else:
        for module in (up, head):
            tensor = module.weight.char() if stored == "int8" else module.weight.to("meta")
            module.weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(ConfigError, match=r"init_layers \[1\] cannot copy blocks of a quantized .* init_layers=None"):
        started(base, init_layers=[1])
    saved_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be fitted to the base's head, which is quantized or offloaded"):
        started(base, backbone=str(tmp_path))


@pytest.fixture(params=["random", "narrow", "copies", "narrow copies", "pretrained", "earlier", "plain"])
def any_start(request, tmp_path):
    """A way to start, and the directory that it reads."""
    source, kind = tmp_path / "source", request.param
    if kind == "pretrained":
        saved_pretrained(source)
    elif kind == "earlier":
        source_directory(source, **NARROW)
    elif kind == "plain":
        perturbed_model().detached().save_pretrained(source)
    settings = {
        "random": {},
        "narrow": NARROW,
        "copies": {"init_layers": [0, -1]},
        "narrow copies": {"init_layers": [0, -1], **NARROW},
        "pretrained": {"backbone": str(source)},
        "earlier": {"init_from": str(source), **NARROW},
        "plain": {"init_from": str(source)},
    }[kind]
    return settings, source


@torch.no_grad()
def test_the_attached_model_starts_as_the_base_to_the_bit_and_learns(any_start):
    settings, _ = any_start
    base, ids = tiny_base(), tokens(2, 9)
    expected = base(ids).logits
    model = started(base, **settings)
    assert torch.equal(model(ids).logits, expected)
    with torch.enable_grad():
        perturb(model).train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.shadow.parameters())


@torch.no_grad()
def test_a_saved_shadow_loads_without_what_it_started_from(any_start, tmp_path):
    settings, source = any_start
    model = perturb(started(**settings)).eval()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source, ignore_errors=True)
    loaded = ShadowForCausalLM.from_pretrained(str(tmp_path / "saved"), base=tiny_base())
    for mode in ("attached", "detached"):
        assert torch.equal(loaded.set_mode(mode)(tokens(2, 9)).logits, model.set_mode(mode)(tokens(2, 9)).logits)
    assert loaded.config.start == model.config.start
    model.detached().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(tokens(2, 9)).logits, detached_logits(model), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shadow_with_a_window_decodes_beyond_it():
    model = perturb(started(tiny_base("gemma3_text"), init_layers=[0]), scale=0.1).eval()
    ids = tokens(1, 20)
    for mode in ("attached", "detached"):
        model.set_mode(mode)
        cached = model.generate(ids, max_new_tokens=8, do_sample=False)
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)
