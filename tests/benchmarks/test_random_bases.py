import pytest
import torch

from benchmarks.bases import base_config, check_length, load_benchmark_base
from shadowtune.errors import ConfigError
from shadowtune.model.budget import shapeless_base
from tests.support.bases import tiny_base

CPU = torch.device("cpu")


def test_qwen3_8b_has_the_parameters_of_the_published_model():
    with torch.device("meta"):
        shapeless = shapeless_base(base_config("qwen3-8b-random"))
    assert shapeless.num_parameters() == 8_190_735_360
    assert {tuple(layer.self_attn.k_proj.weight.shape) for layer in shapeless.model.layers} == {(8 * 128, 4096)}


def test_a_well_known_shape_is_a_base_with_random_weights():
    with torch.device("meta"):
        shapeless = shapeless_base(base_config("llama-3.2-3b-random"))
    assert shapeless.num_parameters() == 3_212_749_824


@pytest.mark.parametrize("name", ["tiny", "qwen3-8b-random", "llama-3.2-3b-random"])
def test_random_bases_can_be_cut_to_their_first_blocks(name):
    config = base_config(f"{name}:3")
    assert config.num_hidden_layers == 3 < base_config(name).num_hidden_layers
    assert config.hidden_size == base_config(name).hidden_size
    if name == "tiny":
        assert len(load_benchmark_base("tiny:3", torch.bfloat16, CPU).model.layers) == 3


def test_a_base_on_disk_keeps_the_weights_of_its_first_blocks(tmp_path):
    whole = tiny_base("qwen3", num_hidden_layers=3)
    whole.save_pretrained(tmp_path)
    cut = load_benchmark_base(f"{tmp_path}:2", torch.float32, CPU)
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 2
    for ours, theirs in zip(cut.model.layers, whole.model.layers, strict=False):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    ids = torch.arange(3, 8).unsqueeze(0)
    assert cut(input_ids=ids).logits.shape == (1, 5, cut.config.vocab_size)


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_a_base_cannot_be_cut_to_what_it_does_not_have(blocks):
    with pytest.raises(ConfigError, match=f"tiny has 4 blocks; it cannot be cut to {blocks}"):
        base_config(f"tiny:{blocks}")


def test_rows_longer_than_the_positions_are_refused():
    check_length(base_config("tiny"), 2048, "tiny")
    with pytest.raises(ConfigError, match="length 2049 exceeds the 2048 positions of tiny"):
        check_length(base_config("tiny"), 2049, "tiny")
