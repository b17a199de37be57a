import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from shadowtune import ShadowConfig
from shadowtune.config.loading import dump_config
from shadowtune.errors import TrainingError
from shadowtune.training.checkpoints import check_checkpoint
from shadowtune.training.run import train
from shadowtune.training.trainer import ShadowTrainer
from tests.support.runs import run_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

DIE_WHILE_SAVING_STEP_6 = """
import os, signal, sys
import torch
from transformers import Trainer
from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.training.run import train

save = Trainer._save_rng_state

def save_or_die(trainer, directory):
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, directory)

Trainer._save_rng_state = save_or_die
torch.set_num_threads(1)
train(load_config(TrainConfig, sys.argv[1], []), quiet=True)
"""


def eventful_config(path: Path):
    """Eight steps with everything that draws random numbers or counts: dropout, accumulation, validation, epochs."""
    config = run_config(
        path,
        shadow=ShadowConfig(rank=4, update_width=3, dropout=0.3),
        batch_size=2,
        gradient_accumulation_steps=2,
        epochs=3.0,
        max_steps=8,
        save_steps=2,
        eval_steps=3,
    )
    return replace(config, data=replace(config.data, validation=config.data.train))


def trajectory(run: Path):
    """What the log says, times and rates left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("_runtime", "_per_second")
    kept = [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]
    return [line for line in kept if "train_loss" not in line]


def assert_same_run(left: Path, right: Path):
    assert trajectory(left) == trajectory(right)
    weights, expected = (load_file(next((run / "model").glob("*.safetensors"))) for run in (left, right))
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    summaries = [json.loads((run / "summary.json").read_text()) for run in (left, right)]
    same = ("steps", "final_loss", "skipped_steps")
    assert [summaries[0][name] for name in same] == [summaries[1][name] for name in same]


def assert_resumes_after_a_stop(config, stop, tmp_path, monkeypatch):
    """Run to the end, and again with a stop before step ``stop`` and a resumption; both must be the same run."""
    train(replace(config, output=str(tmp_path / "whole")), quiet=True)
    step = ShadowTrainer.training_step

    def step_or_stop(trainer, *args, **kwargs):
        if trainer.state.global_step == stop:
            raise TrainingError("stopped")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(ShadowTrainer, "training_step", step_or_stop)
    with pytest.raises(TrainingError, match="stopped"):
        train(config, quiet=True)
    monkeypatch.undo()
    train(config, resume=True, quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("steps", [8, 7])
def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_further_step(tmp_path, steps):
    config = replace(eventful_config(tmp_path), output=str(tmp_path / "whole"), max_steps=steps, save_steps=1)
    train(config, quiet=True)
    train(replace(config, output=str(tmp_path / "killed")), quiet=True)
    (tmp_path / "killed" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "model")
    summary = train(replace(config, output=str(tmp_path / "killed")), resume=True, quiet=True)
    assert summary.steps == steps
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_was_killed_while_saving_resumes_to_the_same_trajectory(tmp_path):
    config = eventful_config(tmp_path)
    dump_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-c", DIE_WHILE_SAVING_STEP_6, str(tmp_path / "config.yaml")]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".saving", "checkpoint-2", "checkpoint-4"]
    assert trajectory(tmp_path / "run")[-1]["step"] == 6

    resumed = train(config, resume=True, quiet=True)
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole, quiet=True)
    assert resumed.steps == 8
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (4, {}),
        (5, {}),
        (5, {"method": "lora"}),
        (3, {"method": "full"}),
        (5, {"group_by_length": True}),
        (7, {"group_by_length": True, "padding_free": True}),
    ],
)
def test_a_run_that_stopped_anywhere_resumes_to_the_same_trajectory(stop, settings, tmp_path, monkeypatch):
    config = replace(eventful_config(tmp_path), **settings)
    assert_resumes_after_a_stop(config, stop, tmp_path, monkeypatch)


def test_ctrl_c_ends_in_one_line_and_keeps_the_last_checkpoint(tmp_path):
    config = replace(run_config(tmp_path), epochs=1e6, save_steps=1)
    dump_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "shadowtune", "train", str(tmp_path / "config.yaml"), "--quiet"]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (checkpoints / "checkpoint-3").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("shadowtune: interrupted; finished checkpoints are kept")
    check_checkpoint(Path(get_last_checkpoint(str(checkpoints))))
    assert "not finished" in (tmp_path / "run" / "report.html").read_text()
