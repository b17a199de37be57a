"""Every YAML that we ship loads, and says at its head how to run it."""

from pathlib import Path

import pytest

from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.training import TrainConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_names_its_command_and_survives_being_dumped(path, tmp_path):
    config = load_config(TrainConfig, path, [])
    head = [line for line in path.read_text().splitlines()[:5] if line.startswith("#")]
    verb = "pretrain" if config.stage == "pretrain" else "train"
    assert any(f"shadowtune {verb} configs/{path.name}" in line for line in head)
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml", []) == config


def test_there_are_configs():
    assert len(CONFIGS) >= 3
