"""Launchers' settings that a run does not support are refused before the base is loaded."""

import pytest

from shadowtune.config.settings import from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError
from shadowtune.training.run import train
from tests.support.runs import rows_file

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def settings(tmp_path, **changes) -> TrainConfig:
    rows = rows_file(tmp_path / "rows.jsonl")
    values = {"model": "no/such-base", "output": str(tmp_path / "run"), "data": {"train": rows, "validation": rows}}
    return from_mapping(TrainConfig, {**values, **changes})


@pytest.mark.parametrize(
    ("launcher", "changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "set FULL_STATE_DICT"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "gradient_checkpointing"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading"),
        ({}, {"fit_logit_interpolation": True}, "fit_logit_interpolation=false"),
        ({}, {"preset": "recommended"}, "fit_logit_interpolation=false"),
        ({}, {"drafting_epochs": 1.0, "shadow": {"draft_rank": 2}}, "drafting_epochs=0"),
        ({}, {"distillation_epochs": 1.0, "shadow": {"variant": "stateless"}}, "distillation_epochs=0"),
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

    def __init__(self, stage: int, gathers: bool):
        self.zero_stage = stage
        self.deepspeed_config = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": gathers}}


def test_fsdp2_with_whole_state_dicts_and_zero_pass_and_zero_3_that_saves_no_adapter_is_refused(tmp_path, monkeypatch):
    from shadowtune.training.parallelism import check_parallelism
    from shadowtune.training.trainer import training_arguments

    config = settings(tmp_path)
    arguments = training_arguments(config, tmp_path / "checkpoints")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    check_parallelism(config, arguments)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for plugin in (Plugin(2, False), Plugin(3, True)):
        arguments.deepspeed_plugin = plugin
        check_parallelism(config, arguments)
    arguments.deepspeed_plugin = Plugin(3, False)
    with pytest.raises(ConfigError, match="zero3_save_16bit_model: true"):
        check_parallelism(config, arguments)
    arguments.deepspeed_plugin = Plugin(3, True)
    with pytest.raises(ConfigError, match="drafting_epochs=0"):
        check_parallelism(settings(tmp_path, drafting_epochs=1.0, shadow={"draft_rank": 2}), arguments)


@pytest.mark.parametrize("dimension", ["tp", "cp", "sp"])
def test_other_dimensions_of_accelerate_are_refused(dimension, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{dimension.upper()}_SIZE", "2")
    with pytest.raises(ConfigError, match=f"{dimension}_size=2"):
        train(settings(tmp_path), quiet=True)
