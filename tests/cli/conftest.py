"""One trained run for all tests of the command line."""

import pytest

from shadowtune.cli.main import main
from tests.support.commands import save_base, write_config, write_rows


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def shadow_run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "shadow.yaml", base, data, folder / "shadow")
    assert main(["train", str(config), "--quiet"]) == 0
    return folder / "shadow"


@pytest.fixture(scope="session")
def lora_run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "lora.yaml", base, data, folder / "lora", "method: lora\n")
    assert main(["train", str(config), "--quiet"]) == 0
    return folder / "lora"
