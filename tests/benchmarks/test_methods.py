import sys

import pytest
import torch

from benchmarks.bases import base_config, load_benchmark_base
from benchmarks.methods import BASELINES, METHODS, OURS, check_baselines, count_method, growth_of_method
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.methods import trainable_parameters
from tests.support.bases import tiny_config

TRAINED = [name for name, method in METHODS.items() if method.size_name is not None]


@pytest.mark.parametrize("name", TRAINED)
def test_growth_foretells_the_count_of_the_real_model(name):
    growth = growth_of_method(name, base_config("tiny"))
    base = load_benchmark_base("tiny", torch.float32, torch.device("cpu"))
    size = 5 * growth.step
    assert trainable_parameters(METHODS[name].build(base, size)) == growth.count(size) > 0


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
@pytest.mark.parametrize("name", TRAINED)
def test_growth_is_linear_on_other_architectures_too(name, model_type):
    config = tiny_config(model_type)
    growth = growth_of_method(name, config)
    assert count_method(name, config, 7 * growth.step) == growth.count(7 * growth.step)
    assert growth.per_step > 0


def test_our_default_size_is_the_default_shadow():
    config = base_config("tiny")
    assert count_method(OURS, config, None) == count_method(OURS, config, config.intermediate_size)


def test_counting_leaves_the_config_alone():
    config = base_config("tiny")
    before = config.to_dict()
    growth_of_method("shadow-peft", config)
    assert config.to_dict() == before


def test_an_unknown_baseline_is_named_with_the_nearest_known_one():
    with pytest.raises(
        ConfigError, match=r"unknown baseline 'peft-shadw' \(did you mean peft-shadow\?\); baselines: lora, "
    ):
        check_baselines(["lora", "peft-shadw"])


def test_there_must_be_a_baseline():
    with pytest.raises(ConfigError, match="no baseline"):
        check_baselines([])


@pytest.mark.parametrize(
    ("baseline", "package", "name"),
    [("lora", "peft", "peft"), ("peft-shadow", "peft", "peft"), ("shadow-peft", "shadow_peft", "shadow-peft")],
)
def test_a_baseline_that_is_not_installed_says_what_to_install(monkeypatch, baseline, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ShadowtuneError, match=rf"baseline {baseline} needs {name}, .* pip install 'shadowtune\[bench\]'"
    ) as said:
        check_baselines(["base", baseline])
    assert "\n" not in str(said.value)


def test_a_peft_without_a_shadow_is_too_old(monkeypatch):
    import peft

    monkeypatch.delattr(peft, "ShadowConfig")
    with pytest.raises(ShadowtuneError, match=r"peft 0.21 or later: pip install 'shadowtune\[bench\]'"):
        count_method("peft-shadow", base_config("tiny"), 8)


def test_an_architecture_that_a_package_refuses_is_one_line():
    with pytest.raises(ShadowtuneError, match=r"lora does not work on mixtral: .*dropout.*; leave it out"):
        count_method("lora", tiny_config("mixtral"), 1)


def test_the_installed_baselines_are_known():
    check_baselines(tuple(BASELINES))
