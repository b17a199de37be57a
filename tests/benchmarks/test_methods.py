import sys

import pytest
import torch

from benchmarks.bases import base_config, load_benchmark_base
from benchmarks.methods import BASELINES, CUDA_BASELINES, METHODS, OURS, check_baselines, count_method, growth_of_method
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.methods import trainable_parameters
from tests.support.bases import tiny_config

TRAINED = [name for name, method in METHODS.items() if method.size_name is not None and name not in CUDA_BASELINES]


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


def test_fused_lora_has_the_parameters_of_lora_and_needs_a_gpu(monkeypatch):
    assert growth_of_method("lora-liger", base_config("tiny")) == growth_of_method("lora", base_config("tiny"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="baseline lora-liger runs on CUDA devices; pass --device cuda"):
        check_baselines(["lora-liger"], device="cpu")


def test_fused_lora_computes_loras_loss_and_gradients(monkeypatch):
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which it exchanges for the whole process
        monkeypatch.setattr(modeling_llama, name, vars(modeling_llama)[name])
    ids = torch.arange(3, 15).reshape(2, 6)
    found = {}
    for name in ("lora", "lora-liger"):
        torch.manual_seed(0)
        model = METHODS[name].build(load_benchmark_base("tiny:2", torch.float32, torch.device("cpu")), 4)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        found[name] = (loss.detach(), torch.cat([each.flatten() for each in gradients]))
    assert torch.allclose(found["lora"][0], found["lora-liger"][0], rtol=1e-5)
    assert torch.allclose(found["lora"][1], found["lora-liger"][1], rtol=1e-3, atol=1e-6)


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
