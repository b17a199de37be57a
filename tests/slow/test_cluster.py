"""Whole runs by a scheduler: a comparison by submitit's local one, two nodes' torchrun by the job file for Slurm."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shadowtune.comparison.plan import Plan
from shadowtune.comparison.run import compare
from shadowtune.config.loading import dump_config
from shadowtune.config.shadow import ShadowConfig
from shadowtune.training.run import train
from tests.support.comparisons import compare_config
from tests.support.runs import run_config

pytestmark = pytest.mark.slow


def test_runs_in_a_scheduler_equal_runs_on_this_machine(tmp_path):
    pytest.importorskip("submitit")
    here = compare(Plan.of(compare_config(tmp_path)))
    cluster = {"scheduler": "local", "gpus_per_run": 0, "cpus_per_run": 1}
    there = compare(Plan.of(compare_config(tmp_path, output=str(tmp_path / "there"), cluster=cluster, jobs=2)))
    assert [row["error"] for row in there.rows] == [None] * 3

    def measured(results):
        return [(row["run"], [(each["mode"], each["loss"]) for each in row["evaluations"]]) for row in results.rows]

    assert measured(there) == measured(here)


PROGRAMS = {
    "scontrol": "echo 127.0.0.1",
    "srun": 'shift\n"$@" &\nfirst=$!\n"$@" || exit 1\nwait $first',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
"""Both nodes are this machine: ``srun`` starts the same command once for each."""


def test_two_nodes_of_the_job_file_train_what_one_process_trains(tmp_path):
    shadow = ShadowConfig(rank=4, update_width=3, dropout=0.0)
    one = run_config(tmp_path, shadow=shadow, batch_size=2, output=str(tmp_path / "one"))
    train(one, quiet=True)
    dump_config(replace(one, batch_size=1, output=str(tmp_path / "two")), tmp_path / "two.yaml")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, script in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "PORT": "29517"}
    environment = {**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    file = Path(__file__).parents[2] / "deploy" / "slurm" / "train.sbatch"
    command = ["bash", str(file), str(tmp_path / "two.yaml"), "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained:") == 1
    weights, reference = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one"))
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        assert (weights[name] - tensor).abs().max() < 1e-4, name
