import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

from shadowtune.config.loading import load_config
from shadowtune.config.serving import PolicyConfig
from shadowtune.config.training import TrainConfig
from tests.support.commands import save_base

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "robot"


def load(name):
    """Import a file of the example as Python does when it is run: its directory comes first in the path."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location(f"robot_{name}", EXAMPLE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("commands", None)
    return module


@pytest.fixture(scope="module")
def commands():
    return load("commands")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_intent_is_an_action_and_everything_else_is_open(commands, tmp_path):
    from shadowtune.data.sources import load_rows

    commands.write_commands(tmp_path)
    for split, count, remote in (("train", 2000, 500), ("validation", 340, 40), ("test", 570, 120)):
        rows, source = read(tmp_path / f"{split}.jsonl"), load_rows(commands.SOURCE, split)
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
        assert len(rows) == count
        assert sum(row["completion"] == "[REMOTE]" for row in rows) == remote
        for row, original in zip(rows, source, strict=True):
            assert (row["completion"] == "[REMOTE]") == (original["completion"] == "out of scope")
    assert len(set(commands.ACTIONS.values())) == 15


def test_the_settings_load_and_name_their_command():
    config = load_config(TrainConfig, EXAMPLE / "robot.yaml", [])
    assert config.data.train == "runs/robot/data"
    assert config.output == "runs/robot/shadow"
    assert "shadowtune train examples/robot/robot.yaml" in (EXAMPLE / "robot.yaml").read_text()


def test_with_the_recommended_preset_the_settings_of_the_file_still_apply(tmp_path):
    file = tmp_path / "robot.yaml"
    file.write_text(f"preset: recommended\n{(EXAMPLE / 'robot.yaml').read_text()}")
    shadow = load_config(TrainConfig, file, []).shadow
    assert (shadow.variant, shadow.rank, shadow.shadow_loss_weight) == ("stateless", 16, 1.0)


def test_files_that_the_readme_names_are_there():
    readme = (EXAMPLE / "README.md").read_text()
    assert "python examples/robot/run.py" in readme
    assert "(commands.py)" in readme


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    place = tmp_path_factory.mktemp("robot")
    base = save_base(place / "base")
    command = ["--quick", "--lora", "--model", str(base), "--output", str(place / "out")]
    example = load("run")

    def run():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = example.main(command)
        return code, said.getvalue()

    code, said = run()
    assert code == 0, said
    return place / "out", said, run


def steps_of(said):
    return [line.split()[2] for line in said.splitlines() if line.startswith("$ shadowtune")]


def test_one_command_trains_detaches_exports_calibrates_and_simulates(robot):
    place, said, _ = robot
    assert steps_of(said) == ["train", "detach", "export", "calibrate", "train", "simulate"]
    assert (place / "edge-int8" / "model.onnx").is_file()
    assert PolicyConfig.load(place / "policy.json").tag == "[REMOTE]"
    policies = {
        line["policy"]: line for line in read(place / "simulation" / "results.jsonl") if line["kind"] == "policy"
    }
    assert {"always-edge", "always-cloud", "lora-cloud", "verify", "policy"} <= set(policies)
    assert policies["always-cloud"]["deferral_rate"] == 1
    assert (place / "simulation" / "simulation.png").is_file()
    assert "policy: " in said


def test_run_again_only_the_simulation_is_done_again_and_from_its_records(robot):
    place, _, run = robot
    before = (place / "simulation" / "results.jsonl").read_bytes()
    code, said = run()
    assert (code, steps_of(said)) == (0, ["simulate"])
    assert (place / "simulation" / "results.jsonl").read_bytes() == before


def test_a_step_that_fails_ends_it_with_its_code(tmp_path, capsys):
    assert load("run").main(["--quick", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert steps_of(capsys.readouterr().out) == ["train"]
