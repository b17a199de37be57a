import pytest
import torch

from benchmarks.bases import base_config, base_tokenizer, check_length, load_benchmark_base
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.budget import shapeless_base
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")


def test_the_tiny_base_is_the_same_each_time_and_frozen():
    torch.manual_seed(0)
    first = load_benchmark_base("tiny", torch.float32, CPU)
    torch.manual_seed(0)
    second = load_benchmark_base("tiny", torch.float32, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_a_directory_is_loaded_in_the_precision_that_was_asked_for(tmp_path):
    base = tiny_base("qwen2")
    base.save_pretrained(tmp_path)
    loaded = load_benchmark_base(str(tmp_path), torch.bfloat16, CPU)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.model_type == base_config(str(tmp_path)).model_type == "qwen2"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_base_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"cannot load the model \./nowhere"):
        base_config("./nowhere")


def test_a_random_base_reads_bytes():
    tokenizer = base_tokenizer("tiny:2")
    assert len(tokenizer) <= base_config("tiny").vocab_size
    text = "any text: naïve  日本\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_directory_has_its_own_tokenizer_or_none(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        base_tokenizer(str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert base_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_shapeless_base_has_every_parameter_and_no_memory():
    with torch.device("meta"):
        shapeless = shapeless_base(base_config("tiny"))
    real = load_benchmark_base("tiny", torch.float32, CPU)
    assert {parameter.device.type for parameter in shapeless.parameters()} == {"meta"}
    assert shapeless.num_parameters() == real.num_parameters()


def test_positions_of_a_base_with_names_of_its_own_are_known():
    with pytest.raises(ConfigError, match="length 129 exceeds the 128 positions"):
        check_length(tiny_base("gpt2").config, 129, "it")
