import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.model.backbone import (
    FrozenEmbedding,
    build_backbone,
    copy_position_embeddings,
    load_pretrained_backbone,
    mirror_config,
    sizes_of,
)
from tests.support.bases import CONFIGS, VOCABULARY, tiny_base, tiny_config
from tests.support.shadows import tokens


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mirror_has_the_bases_architecture_and_is_small(kind):
    base = tiny_config(kind)
    before = base.to_dict()
    mirror = mirror_config(base, ShadowConfig(num_shadow_layers=2, intermediate_size=24))
    assert base.to_dict() == before
    assert type(mirror) is type(base)
    assert (mirror.num_hidden_layers, mirror.hidden_size) == (2, 32)
    backbone = build_backbone(mirror)
    assert not any(parameter.shape[0] in (1, VOCABULARY) for parameter in backbone.parameters())
    assert (backbone.config.vocab_size, backbone.config.pad_token_id) == (VOCABULARY, 0)
    widths = {parameter.shape for name, parameter in backbone.named_parameters() if "mlp" in name or "fc1" in name}
    assert any(24 in shape or 48 in shape for shape in widths)  # gate and up may be one matrix
    blocks = next(module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList))
    assert len(blocks) == 2


def test_every_size_can_be_overridden():
    mirror = mirror_config(
        tiny_config("qwen3"),
        ShadowConfig(
            num_shadow_layers=3,
            hidden_size=24,
            intermediate_size=20,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=10,
        ),
    )
    backbone = build_backbone(mirror)
    block = backbone.layers[0]
    assert len(backbone.layers) == 3
    assert block.mlp.up_proj.weight.shape == (20, 24)
    assert block.self_attn.q_proj.weight.shape == (60, 24)
    assert block.self_attn.k_proj.weight.shape == (30, 24)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("gpt2", {"hidden_size": 30}, "hidden_size 30 must be a multiple of num_attention_heads 4"),
        ("opt", {"num_attention_heads": 5}, "hidden_size 32 must be a multiple of num_attention_heads 5"),
        ("llama", {"num_attention_heads": 3}, "num_attention_heads 3 must be a multiple of num_key_value_heads 2"),
        ("gpt2", {"num_key_value_heads": 2}, "num_key_value_heads cannot be set for a mirror of gpt2"),
        ("gpt_neox", {"head_dim": 2}, "head_dim cannot be set for a mirror of gpt_neox"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(kind, sizes, message):
    with pytest.raises(ConfigError, match=message):
        ShadowForCausalLM.from_base(tiny_base(kind), ShadowConfig(**sizes))


def test_a_mirror_of_a_hybrid_or_windowed_base_has_full_attention():
    for kind in ("qwen3_next", "gemma2", "gpt_oss"):
        assert mirror_config(tiny_config(kind), ShadowConfig(num_shadow_layers=2)).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("gemma3_text", "layer_types", ["sliding_attention", "full_attention"]),
        ("smollm3", "no_rope_layers", [0, 1]),
        ("mixtral", "num_local_experts", 4),
        ("qwen3_moe", "decoder_sparse_step", 1),
    ],
)
def test_a_mirror_of_copies_is_built_as_the_blocks_it_copies(kind, name, expected):
    base = tiny_config(kind)
    before = base.to_dict()
    mirror = mirror_config(base, ShadowConfig(init_layers=[-1, 2]))
    assert mirror.num_hidden_layers == 2
    assert getattr(mirror, name) == expected
    assert base.to_dict() == before


def test_sizes_have_the_names_of_our_settings():
    sizes = {"num_shadow_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    assert sizes_of(tiny_config("gpt2")) == {**sizes, "intermediate_size": None} | dict.fromkeys(
        ("num_key_value_heads", "head_dim")
    )
    assert sizes_of(tiny_config("opt"))["intermediate_size"] == 48
    assert sizes_of(tiny_config("qwen3")) == {
        **sizes,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


def test_a_mirror_of_a_quantized_base_is_not_quantized():
    base = tiny_config()
    base.quantization_config = {"quant_method": "torchao"}
    assert "quantization_config" not in mirror_config(base, ShadowConfig()).to_dict()
    assert base.quantization_config


@pytest.mark.parametrize(("kind", "path"), [("gpt2", "wpe"), ("opt", "embed_positions")])
def test_learned_positions_start_from_the_bases(kind, path):
    base = tiny_base(kind)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    weight = model.shadow.backbone.get_submodule(path).weight
    assert torch.equal(weight, base.get_decoder().get_submodule(path).weight)
    assert weight.requires_grad
    narrow = build_backbone(mirror_config(base.config, ShadowConfig(hidden_size=16)))
    copy_position_embeddings(narrow, base)  # of another width: nothing to copy


def test_a_pretrained_backbone_keeps_its_weights_and_freezes_its_embedding(tmp_path):
    source = tiny_base("qwen2", seed=5, num_hidden_layers=2, hidden_size=16)
    source.save_pretrained(tmp_path)
    loaded = load_pretrained_backbone(str(tmp_path), VOCABULARY)
    backbone, embedding = loaded.network, loaded.embedding
    assert isinstance(embedding, FrozenEmbedding)
    assert torch.equal(loaded.head, source.lm_head.weight)
    assert loaded.logits_transform is None
    assert loaded.projection is None
    assert list(embedding.parameters()) == []
    with torch.no_grad():
        expected = source.model(tokens(2, 9)).last_hidden_state
        assert torch.equal(backbone(inputs_embeds=embedding(tokens(2, 9))).last_hidden_state, expected)
    model = ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(backbone=str(tmp_path)))
    names = {name for name, _ in model.shadow.named_parameters()}
    assert {name.removeprefix("model.") for name, _ in source.named_parameters()} - {
        name.removeprefix("backbone.") for name in names
    } == {"embed_tokens.weight", "lm_head.weight"}


def test_a_pretrained_backbone_that_does_not_fit_or_load_is_an_error(tmp_path):
    tiny_base("qwen2", vocab_size=99).save_pretrained(tmp_path / "other")
    for name, message in (
        ("other", "vocabulary of 99 tokens, the base one of 97"),
        ("none", "cannot load the backbone"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(backbone=str(tmp_path / name)))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
