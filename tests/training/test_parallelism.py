"""Launchers' settings that a run does not support are refused before the base is loaded."""

from dataclasses import replace

import pytest
import torch

from shadowtune import ShadowConfig
from shadowtune.config.settings import from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError, TrainingError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.training import parallelism
from shadowtune.training.parallelism import (
    asks_for_checkpointing,
    check_parallelism,
    check_same_inputs,
    converted_losses,
    fsdp_plugin,
)
from shadowtune.training.run import train
from shadowtune.training.trainer import training_arguments
from tests.support.bases import tiny_base
from tests.support.runs import rows_file, run_config

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}

PARTS = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def settings(tmp_path, **changes) -> TrainConfig:
    rows = rows_file(tmp_path / "rows.jsonl")
    values = {"model": "no/such-base", "output": str(tmp_path / "run"), "data": {"train": rows, "validation": rows}}
    return from_mapping(TrainConfig, {**values, **changes})


@pytest.mark.parametrize(
    ("launcher", "changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        (PARTS, {"base_quantization": "nf4"}, "base_quantization=nf4 .* set fsdp_cpu_ram_efficient_loading: false"),
        (PARTS, {"method": "full", "shadow": {}}, "method=full .* set fsdp_cpu_ram_efficient_loading: false"),
        (PARTS, {"method": "dora", "shadow": {}}, "method=dora .* set fsdp_cpu_ram_efficient_loading: false"),
        (
            PARTS | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            {},
            "dp_replicate_size=2 .* set fsdp_cpu_ram_efficient_loading: false",
        ),
        ({}, {"gradient_checkpointing": "reentrant"}, "gradient_checkpointing=non_reentrant"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "started 8 processes, but 1"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, {}, "torchrun --nproc-per-node"),
    ],
)
def test_layouts_of_fsdp_that_lose_something_are_refused(launcher, changes, words, tmp_path, monkeypatch):
    for name, value in {**FSDP, **launcher}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        train(settings(tmp_path, **changes), quiet=True)
    assert not (tmp_path / "run").exists()


class Plugin:
    """Stands for accelerate's, whose package may be missing."""

    def __init__(self, stage: int):
        self.zero_stage = stage


def test_fsdp2_and_zero_pass_and_stages_that_need_the_whole_model_are_refused(tmp_path, monkeypatch):
    config = settings(tmp_path)
    arguments = training_arguments(config, tmp_path / "checkpoints")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    check_parallelism(config, arguments)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    check_parallelism(config, arguments)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for stage in (2, 3):
        arguments.deepspeed_plugin = Plugin(stage)
        check_parallelism(config, arguments)
    with pytest.raises(ConfigError, match="drafting_epochs=0"):
        check_parallelism(settings(tmp_path, drafting_epochs=1.0, shadow={"draft_rank": 2}), arguments)
    with pytest.raises(ConfigError, match="nonfinite_loss=stop"):
        check_parallelism(replace(config, nonfinite_loss="skip"), arguments)


def test_a_layout_that_one_process_cannot_have_is_an_error(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="another layout than NO"):
        train(config, quiet=True)


def test_the_classes_of_the_blocks_are_found_and_losses_stay_float32(monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    model = ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(rank=4))
    plugin = fsdp_plugin(model, bf16=True)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert not plugin.activation_checkpointing
    assert asks_for_checkpointing()
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert fsdp_plugin(model, bf16=True) is None


def test_processes_that_read_different_things_say_what(monkeypatch):
    others = {"the training rows": "a", "the setting seed": 1}
    monkeypatch.setattr(parallelism, "gather_object", lambda own: [*own, others])
    check_same_inputs(others, processes=2)
    with pytest.raises(ConfigError, match="the setting seed of process 1 differ from those of process 0") as caught:
        check_same_inputs({**others, "the setting seed": 2}, processes=2)
    assert caught.value.in_every_process


def test_the_end_of_another_process_is_one_line_and_other_errors_stay():
    with pytest.raises(TrainingError, match="process 1 stops"), converted_losses(1):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:37")
    with pytest.raises(RuntimeError, match="shape"), converted_losses(1):
        raise RuntimeError("shape '[2]' is invalid")


@pytest.mark.parametrize("dimension", ["tp", "cp", "sp"])
def test_other_dimensions_of_accelerate_are_refused(dimension, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{dimension.upper()}_SIZE", "2")
    with pytest.raises(ConfigError, match=f"{dimension}_size=2"):
        train(settings(tmp_path), quiet=True)
