"""The training scripts of ``examples`` run in process, for two steps on a tiny model."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.support.runs import model_directory

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("trainer", "sft", "dpo", "grpo", "classification")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, about its own defaults


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_saves_and_reports(name, model, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"model": model, "output": str(tmp_path / "out"), "steps": 2, "shadow_epochs": 0.02, "tests": 4}
    module.main(argparse.Namespace(**options))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("attached: ") for line in lines)
    assert any(line.startswith("detached: ") for line in lines)
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "SHADOWTUNE"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_fits_on_a_page(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
