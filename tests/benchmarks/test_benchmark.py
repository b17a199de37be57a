import dataclasses
import pickle

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS
from benchmarks.benchmark import Settings, numbers, words
from shadowtune.errors import ConfigError


def test_lists_are_split_at_commas_and_hold_each_thing_once():
    assert words(" lora, dora,lora,,") == ("lora", "dora")
    assert numbers("1.0,0.25, 1") == (1.0, 0.25)
    assert words("") == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warm_up": -1}, "warm_up must be at least 0, got -1"),
        ({"dtype": "float46"}, "dtype must be one of float32, bfloat16, got 'float46' (did you mean float16"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
    ],
)
def test_settings_out_of_range_are_named(wrong, said):
    with pytest.raises(ConfigError) as refused:
        Settings(**wrong)
    assert said.split(" (did")[0] in str(refused.value)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        Settings(device="cuda")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_settings_survive_the_way_to_a_worker(name):
    settings = BENCHMARKS[name].settings(repeats=3)
    open_, sent = pickle.loads(pickle.dumps((BENCHMARKS[name].open, settings)))
    assert (open_, sent) == (BENCHMARKS[name].open, settings)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_setting_is_an_option_and_every_context_name_a_setting(name):
    bench = BENCHMARKS[name]
    fields = dataclasses.fields(bench.settings)
    assert all(field.metadata["help"] and callable(field.metadata["parse"]) for field in fields)
    assert set(bench.context) <= {field.name for field in fields}
    assert bench.name == name
