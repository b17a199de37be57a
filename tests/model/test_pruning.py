import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.model.backbone import mirror_config
from shadowtune.model.pruning import prune_blocks
from tests.support.bases import CONFIGS, tiny_base
from tests.support.shadows import tokens

SMALLER = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
KEPT_CHANNELS = [0, 3, 4, 5, 9, 11, 12, 17, 18, 20, 22, 25, 26, 28, 29, 31]
KEPT_UNITS = list(range(1, 41, 2))
FUSED = ("phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "qwen3_moe", "qwen3_next")
SEPARATE = [kind for kind in CONFIGS if kind not in FUSED]


def sizes_for(kind):
    return SMALLER if kind == "opt" else {**SMALLER, "num_key_value_heads": 1}


def channels(heads, width=8):
    return [head * width + i for head in heads for i in range(width)]


def parts(kind):
    """Kept query channels and key channels: two query heads, of the second group where heads are grouped."""
    return (channels([1, 3]), channels([1, 3])) if kind == "opt" else (channels([2, 3]), channels([1]))


@torch.no_grad()
def planted(kind):
    """A base whose channels, heads and units outside the kept ones have weights of nought."""
    base = tiny_base(kind)
    queries, keys = parts(kind)
    kept = {"q": queries, "o": queries, "k": keys, "v": keys, "out": queries}
    embedding = base.get_input_embeddings().weight
    embedding[:, [i for i in range(32) if i not in KEPT_CHANNELS]] = 0
    for name, weight in base.get_decoder().named_parameters():
        module = name.split(".")[-2]
        if weight.ndim != 2 or "embed" in name:
            continue
        heads = kept[module.split("_")[0]] if "attn" in name else KEPT_UNITS
        rows, columns = (heads, KEPT_CHANNELS)
        if module in ("o_proj", "out_proj", "down_proj", "fc2"):
            rows, columns = columns, rows
        mask = torch.zeros_like(weight)
        mask[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1
        weight.mul_(mask)
    return base


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_carries_weight_is_kept_in_its_order(kind):
    base, sizes = planted(kind), sizes_for(kind)
    config = ShadowConfig(init_layers=[2, 0], **sizes)
    blocks = base.get_decoder().layers
    mirror = mirror_config(base.config, config)
    cut, kept = prune_blocks([blocks[i].state_dict() for i in (2, 0)], base.config, mirror)
    queries, keys = parts(kind)
    assert kept.tolist() == KEPT_CHANNELS
    for i, tensors in zip((2, 0), cut, strict=True):
        whole = blocks[i].state_dict()
        q, k = (next(n for n in whole if n.endswith(f"{letter}_proj.weight")) for letter in "qk")
        assert torch.equal(tensors[q], whole[q][queries][:, KEPT_CHANNELS])
        assert torch.equal(tensors[k], whole[k][keys][:, KEPT_CHANNELS])
        up, down = ("fc1", "fc2") if kind == "opt" else ("mlp.up_proj", "mlp.down_proj")
        assert torch.equal(tensors[f"{up}.weight"], whole[f"{up}.weight"][KEPT_UNITS][:, KEPT_CHANNELS])
        assert torch.equal(tensors[f"{down}.weight"], whole[f"{down}.weight"][KEPT_CHANNELS][:, KEPT_UNITS])
        for name in whole:
            if name.endswith(("layernorm.weight", "layer_norm.bias")):
                assert torch.equal(tensors[name], whole[name][KEPT_CHANNELS]), name
            elif name.endswith(("v_proj.bias", "k_norm.weight")):
                expected = whole[name] if len(whole[name]) == 8 else whole[name][keys]
                assert torch.equal(tensors[name], expected), name


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@torch.no_grad()
def test_cutting_off_what_is_nought_changes_nothing(kind):
    base = planted(kind)
    for name, bias in base.get_decoder().named_parameters():
        if name.endswith(("v_proj.bias", "o_proj.bias")):
            bias.zero_()
    base.config.rms_norm_eps = 1e-12
    whole = ShadowForCausalLM.from_base(base, ShadowConfig(init_layers=[1, 2]))
    narrow = ShadowForCausalLM.from_base(base, ShadowConfig(init_layers=[1, 2], **sizes_for(kind)))
    for name, weight in narrow.shadow.backbone.named_parameters():
        if name.endswith("norm.weight") and len(weight) == 16:
            weight.mul_(
                2**0.5
            )  # the mean square over half as many channels, the others being nought, is twice as large
    expected, got = (model.set_mode("detached")(tokens(2, 9)).logits for model in (whole, narrow))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in narrow.shadow.backbone.parameters()) < 0.4 * sum(
        p.numel() for p in whole.shadow.backbone.parameters()
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_bases_own_sizes_leave_everything_as_it_is(kind):
    base = tiny_base(kind)
    blocks = base.get_decoder().get_submodule("h" if kind == "gpt2" else "layers")
    same = {} if kind in ("gpt2", "gpt_neox", "opt") else {"num_key_value_heads": 2}
    config = ShadowConfig(init_layers=[-1], hidden_size=32, num_attention_heads=4, **same)
    state = blocks[-1].state_dict()
    (cut,), kept = prune_blocks([state], base.config, mirror_config(base.config, config))
    assert kept.tolist() == list(range(32))
    assert cut.keys() == state.keys()
    assert all(torch.equal(cut[name], state[name]) for name in state)


@torch.no_grad()
def test_channels_are_chosen_for_all_blocks_together_and_units_for_each():
    base = tiny_base()
    for block, channel, unit in ((0, 30, 7), (1, 31, 9)):
        base.model.layers[block].mlp.up_proj.weight[:, channel] *= 100
        base.model.layers[block].mlp.up_proj.weight[unit] *= 1000
    config = ShadowConfig(init_layers=[0, 1], hidden_size=2, intermediate_size=1)
    states = [base.model.layers[i].state_dict() for i in (0, 1)]
    cut, kept = prune_blocks(states, base.config, mirror_config(base.config, config))
    assert kept.tolist() == [30, 31]
    for state, block, unit in zip(states, cut, (7, 9), strict=True):
        assert torch.equal(block["mlp.up_proj.weight"], state["mlp.up_proj.weight"][[unit]][:, [30, 31]])


@torch.no_grad()
def test_one_large_weight_counts_more_than_many_of_middling_size():
    base = tiny_base()
    layer = base.model.layers[0]
    for parameter in layer.parameters():
        parameter.fill_(0.25)
    layer.mlp.gate_proj.weight[3] = 0.5
    layer.mlp.down_proj.weight[7, 9] = -0.75
    config = ShadowConfig(init_layers=[0], hidden_size=1, intermediate_size=1)
    (cut,), kept = prune_blocks([layer.state_dict()], base.config, mirror_config(base.config, config))
    assert kept.tolist() == [7]
    assert cut["mlp.down_proj.weight"].item() == -0.75


@torch.no_grad()
def test_of_equal_parts_the_first_are_kept():
    base = tiny_base()
    for parameter in base.model.layers[0].parameters():
        parameter.fill_(0.25)
    config = ShadowConfig(init_layers=[0], hidden_size=5, intermediate_size=3)
    _, kept = prune_blocks([base.model.layers[0].state_dict()], base.config, mirror_config(base.config, config))
    assert kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", FUSED)
def test_architectures_with_fused_matrices_or_experts_are_refused_by_name(kind):
    config = ShadowConfig(init_layers=[-1], hidden_size=16, num_attention_heads=2)
    with pytest.raises(ConfigError, match=rf"blocks of {kind} cannot be made narrower|heads of 8 channels") as caught:
        ShadowForCausalLM.from_base(tiny_base(kind), config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("llama", {"hidden_size": 64}, "hidden_size 64 is more than the base's 32"),
        ("llama", {"intermediate_size": 49}, "intermediate_size 49 is more than the base's 48"),
        ("llama", {"num_attention_heads": 6}, "num_attention_heads 6 is more than the base's 4"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 4 is more than the base's 2"),
        ("llama", {"num_key_value_heads": 1}, "4 over num_key_value_heads 1 has more queries to a key than the base's"),
        ("llama", {"head_dim": 4}, "heads of 8 channels, but the mirror's have 4"),
        ("qwen2", {"hidden_size": 16}, "heads of 8 channels, but the mirror's have 4; set num_attention_heads"),
    ],
)
def test_sizes_that_no_copy_can_have_are_an_error(kind, sizes, message):
    with pytest.raises(ConfigError, match=message):
        ShadowForCausalLM.from_base(tiny_base(kind), ShadowConfig(init_layers=[0], **sizes))
