import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shadowtune import ShadowConfig
from shadowtune.config.loading import dump_config
from shadowtune.config.training import DataConfig
from shadowtune.training.run import train
from tests.support.runs import rows_file, run_config

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "shadowtune"]


def lines(file: Path):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(run: Path):
    terms = ("loss", "base_loss", "shadow_loss")
    names = ("step", *terms, *(f"eval_{term}" for term in terms), "grad_norm", "learning_rate")
    return [
        {name: line[name] for name in names if name in line}
        for line in lines(run / "metrics.jsonl")
        if "train_loss" not in line
    ]


def test_two_processes_give_the_result_of_one(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl")
    one = run_config(
        tmp_path,
        shadow=ShadowConfig(rank=4, update_width=3, dropout=0.0),
        batch_size=2,
        gradient_accumulation_steps=2,
        output=str(tmp_path / "one"),
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        report_to=["tensorboard"],
        data=DataConfig(train=rows, validation=rows),
    )
    alone = train(one, quiet=True)

    two = replace(one, batch_size=1, output=str(tmp_path / "two"))
    dump_config(two, tmp_path / "two.yaml")
    result = tmp_path / "two.json"
    command = [*LAUNCH, "train", str(tmp_path / "two.yaml"), "--quiet", "--json", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained:") == 1
    assert done.stderr.count("parameters: base") == 1
    assert done.stderr.count("report: ") == 1

    expected = losses(tmp_path / "one")
    for line, other in zip(losses(tmp_path / "two"), expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    prompts = [[line["prompt"] for line in lines(tmp_path / run / "samples.jsonl")] for run in ("two", "one")]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 3 * 4
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    weights, reference = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one"))
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        assert (weights[name] - tensor).abs().max() < 1e-4, name
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["best_step"], row["steps"]) == (alone.best_step, alone.steps)
    assert row["tokens_per_second"] * row["train_seconds"] == pytest.approx(
        alone.tokens_per_second * alone.train_seconds, abs=1
    )
    progress = json.loads((tmp_path / "two" / "checkpoints" / "checkpoint-6" / "progress.json").read_text())
    assert progress["processes"] == 2
