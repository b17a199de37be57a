"""Directories that parse but are no adapter: each a line, none a traceback, a wait or a machine without memory."""

import copy
import json
import math

import pytest
import torch

from shadowtune import ShadowForCausalLM
from shadowtune.errors import CheckpointError
from shadowtune.export.exporting import read_plain
from shadowtune.export.loading import load_model
from shadowtune.model.checkpoint import read_tensors, write_tensors
from shadowtune.model.files import MAX_MESSAGE, check_numbers, reading
from shadowtune.model.methods import load_base
from tests.support.bases import tiny_base
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

DEEP = "[" * 200_000 + "]" * 200_000
VALUES = (-1, 0, 10**9, 2**70, "x", [[]], 1.5, math.nan)


@pytest.fixture
def saved(tmp_path):
    """A saved shadow without its base, and the contents of its config."""
    model = perturbed_model(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    model.save_pretrained(tmp_path)
    return tmp_path, json.loads((tmp_path / "config.json").read_text())


def refused(directory, match="."):
    with pytest.raises(CheckpointError, match=match) as caught:
        ShadowForCausalLM.from_pretrained(directory, base=tiny_base())
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message or message.startswith("wrong base")
    assert len(message) < 1000


SIZES = [
    *(("base_config", name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")),
    *(("backbone_config", name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "head_dim")),
    *(("shadow", name) for name in ("rank", "update_width")),
]


@pytest.mark.parametrize("place", SIZES, ids=".".join)
def test_sizes_that_cannot_be_are_refused_before_anything_is_reserved_for_them(place, saved):
    directory, content = saved
    for value in VALUES:
        changed = copy.deepcopy(content)
        changed[place[0]][place[1]] = value
        (directory / "config.json").write_text(json.dumps(changed))
        refused(directory)


HEADS = [(part, name) for part in ("base_config", "backbone_config") for name in ("num_attention_heads",)]


@pytest.mark.parametrize("place", HEADS, ids=".".join)
@pytest.mark.parametrize("value", [0, -3, 7, "two", None])
def test_numbers_of_heads_that_cannot_be_are_refused(place, value, saved):
    directory, content = saved
    content[place[0]][place[1]] = value
    if value == -3 and place[0] == "base_config":
        pytest.skip("the base's own config says how many heads it has; this one is not read for it")
    (directory / "config.json").write_text(json.dumps(content))
    refused(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [("draft_vocabulary_size", value) for value in (-1, 10**9, "x", 1.5)]
    + [("id2label", 5), ("dtype", "x"), ("eos_token_id", "x"), ("base_config", [1]), ("shadow", 3)],
)
def test_other_values_of_the_wrong_kind_are_refused(name, value, saved):
    directory, content = saved
    content[name] = value
    (directory / "config.json").write_text(json.dumps(content))
    refused(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_nesting_without_end_is_refused(name, saved):
    directory, _ = saved
    (directory / name).write_text(DEEP)
    refused(directory, name)


@pytest.mark.parametrize("name", ["shadow_config.json", "adapter_config.json"])
def test_nesting_without_end_is_refused_in_files_of_other_libraries(name, tmp_path):
    (tmp_path / name).write_text(DEEP)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_no_precision_are_refused(dtype, saved):
    directory, _ = saved
    tensors = read_tensors(str(directory))
    name = "shadow.boundaries.injection_downs"
    tensors[name] = tensors[name].to(dtype)
    write_tensors(directory, tensors)
    refused(directory, f"{name} has dtype {dtype}")


def test_a_base_or_a_detached_model_that_is_malformed_is_one_line(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    damaged = [json.dumps({**content, "num_attention_heads": 0}), json.dumps({**content, "vocab_size": "x"}), DEEP]
    for text in damaged:
        (tmp_path / "config.json").write_text(text)
        for read in (lambda path: load_base(str(path)), read_plain, load_model):
            with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
                read(tmp_path)
            assert "\n" not in str(caught.value)


def test_numbers_of_real_models_pass_and_messages_are_cut():
    check_numbers({"num_hidden_layers": 126, "max_position_embeddings": 10_485_760, "vocab_size": 262_144}, "x")
    with pytest.raises(CheckpointError, match=r"x: a.num_hidden_layers is 10001, more than any model has"):
        check_numbers({"a": {"num_hidden_layers": 10_001}}, "x")
    with pytest.raises(CheckpointError) as caught, reading("here"):
        raise Exception("word " * 1000)
    assert len(str(caught.value)) == len("here: ") + MAX_MESSAGE
    with pytest.raises(KeyboardInterrupt), reading("here"):
        raise KeyboardInterrupt
