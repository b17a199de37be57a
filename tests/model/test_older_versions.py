import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from shadowtune.model.checkpoint import write_older_keys
from tests.support.bases import tiny_config
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def saved(directory, name="config.json"):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_detached_model_saves_the_base_of_its_rotations_under_both_names(kind, tmp_path):
    model = perturbed_model(kind)
    model.shadow.backbone.config.rope_parameters["rope_theta"] = 12345.0
    model.detached().save_pretrained(tmp_path)
    content = saved(tmp_path)
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 12345.0
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 12345.0


def test_a_model_without_rotations_gets_no_base_of_them(tmp_path):
    perturbed_model("gpt2").detached().save_pretrained(tmp_path)
    write_older_keys(tmp_path)
    assert not saved(tmp_path).keys() & {"rope_theta", "rope_scaling"}


def test_scaled_rotations_are_what_both_versions_read(tmp_path):
    tiny_config("llama", rope_parameters=LLAMA3).save_pretrained(tmp_path)
    write_older_keys(tmp_path)
    content = saved(tmp_path)
    assert content["rope_theta"] == 5e5
    assert content["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == LLAMA3


def test_a_tokenizer_has_a_name_that_both_versions_know_and_stays_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    write_older_keys(tmp_path)
    content = saved(tmp_path, "tokenizer_config.json")
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "token_type_ids" not in content["model_input_names"]
    assert not isinstance(content.get("extra_special_tokens"), list)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>the sea<|tool|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens)


def test_a_directory_without_these_files_is_left_alone(tmp_path):
    write_older_keys(tmp_path)
    assert not list(tmp_path.iterdir())
