"""Every YAML that we ship loads, and says at its head how to run it."""

from pathlib import Path

import pytest

from shadowtune.config.comparison import CompareConfig
from shadowtune.config.loading import SHIPPED, dump_config, load_config
from shadowtune.config.training import TrainConfig

DIRECTORY = SHIPPED
CONFIGS, COMPARISONS = sorted(DIRECTORY.glob("*.yaml")), sorted(DIRECTORY.glob("compare/*.yaml"))


def head(path):
    return [line for line in path.read_text().splitlines()[:5] if line.startswith("#")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_names_its_command_and_survives_being_dumped(path, tmp_path):
    config = load_config(TrainConfig, path, [])
    verb = "pretrain" if config.stage == "pretrain" else "train"
    assert any(f"shadowtune {verb} configs/{path.name}" in line for line in head(path))
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml", []) == config


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_comparison_loads_and_names_its_command(path):
    config = load_config(CompareConfig, path, [])
    assert any(f"shadowtune compare configs/compare/{path.name}" in line for line in head(path))
    assert Path(config.output) == Path("runs") / f"compare-{path.stem if path.stem != 'users' else 'mine'}"
    for task in config.tasks:
        for method in config.methods:
            assert config.train_config(task, method).model == "smollm2-135m"


def test_there_are_configs():
    assert len(CONFIGS) >= 3
    assert len(COMPARISONS) >= 6
