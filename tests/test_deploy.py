"""What the container and job files name exists: files, extras, commands, options, the path of the health check."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from shadowtune.cli.main import COMMANDS, build_parser
from shadowtune.serving.vllm.support import TESTED_VLLM

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
SERVERS = [file for file in FILES if file.name != "train.Dockerfile"]
JOBS = sorted((ROOT / "deploy" / "slurm").glob("*.sbatch"))
VLLM = ROOT / "deploy" / "vllm.Dockerfile"


def instructions(file):
    """Every instruction on one line, by its name."""
    lines = [line for line in file.read_text().replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_both_sides_training_and_vllm_have_one():
    names = ["cloud.Dockerfile", "edge.Dockerfile", "train.Dockerfile", "vllm.Dockerfile"]
    assert [file.name for file in FILES] == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there(file):
    copied = [name for word, rest in instructions(file) if word == "COPY" for name in rest.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("file", [file for file in FILES if file != VLLM], ids=lambda file: file.name)
def test_what_is_installed_are_pinned_extras_of_ours(file):
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    runs = " && ".join(rest for word, rest in instructions(file) if word == "RUN" and "pip" in rest)
    (asked,) = re.findall(r"\.\[([\w,]+)\]", runs)
    assert ("serve" in asked.split(",")) == (file in SERVERS) and set(asked.split(",")) <= known
    assert runs.count("pip install") == runs.count("-c constraints.txt")


@pytest.mark.parametrize("file", SERVERS, ids=lambda file: file.name)
def test_it_starts_a_command_of_ours_without_privileges(file):
    found = instructions(file)
    (entry,) = [re.findall(r'"([^"]*)"', rest) for word, rest in found if word == "ENTRYPOINT"]
    assert entry[0] == "shadowtune"
    (command,) = [command for command in COMMANDS if command.name == " ".join(entry[1:3])]
    known = build_parser(command).format_help()
    assert all(option.split("=")[0] in known for option in entry[3:])
    words = [word for word, _ in found]
    assert ("USER", "shadowtune") in found and words.index("USER") < words.index("ENTRYPOINT")
    port = next(rest for word, rest in found if word == "EXPOSE")
    check = next(rest for word, rest in found if word == "HEALTHCHECK")
    assert f"--port={port}" in entry and f":{port}/health" in check


def test_the_training_container_runs_any_command_without_privileges_and_can_compile_kernels():
    file = ROOT / "deploy" / "train.Dockerfile"
    found = instructions(file)
    assert ("ENTRYPOINT", '["shadowtune"]') in found and ("USER", "shadowtune") in found
    assert "gcc" in next(rest for word, rest in found if word == "RUN" and "apt-get" in rest)
    examples = re.findall(r"^#       shadowtune-train (.*)", file.read_text(), re.MULTILINE)
    assert [example.split()[0] for example in examples] == ["train", "--standalone"]
    assert torchrun_arguments(examples[1].split()).training_script == "shadowtune"


def torchrun_arguments(words):
    return get_args_parser().parse_args(words)


def run_job(file, directory, *arguments, **environment):
    """Run a job's script with programs of the scheduler that write their arguments down; return its exit and those."""
    programs = directory / "programs"
    programs.mkdir()
    scripts = {
        "scontrol": 'echo "$@" > "$LOG.scontrol"; printf "node7\\nnode8\\n"',
        "srun": 'printf "%s\\n" "$@" > "$LOG.srun"; env > "$LOG.environment"',
        "shadowtune": 'printf "%s\\n" "$@" > "$LOG.shadowtune"; env | grep -c ^SLURM_ > "$LOG.variables" || true',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    variables = {**inherited, "PATH": path, "LOG": str(directory / "log"), **environment}
    done = subprocess.run(["bash", file, *arguments], env=variables, capture_output=True, text=True, check=False)
    logs = {each.suffix[1:]: each.read_text().splitlines() for each in directory.glob("log.*")}
    return done, logs


SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}


def test_a_run_on_several_nodes_is_what_torchrun_and_the_command_line_understand(tmp_path):
    file = ROOT / "deploy" / "slurm" / "train.sbatch"
    done, logs = run_job(
        file, tmp_path, "c.yaml", "data.template=a b", **SLURM, CONTAINER="apptainer exec --nv image.sif"
    )
    assert done.returncode == 0, done.stderr
    assert logs["scontrol"] == ["show hostnames node[7-8]"]
    words = logs["srun"]
    assert words[:6] == ["--kill-on-bad-exit=1", "apptainer", "exec", "--nv", "image.sif", "torchrun"]
    asked = torchrun_arguments(words[6:])
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_id, asked.rdzv_endpoint) == ("2", "8", "42", "node7:29500")
    assert (asked.rdzv_backend, asked.module, asked.training_script) == ("c10d", True, "shadowtune")
    name, *arguments = asked.training_script_args
    (command,) = [command for command in COMMANDS if command.name == name]
    parsed = build_parser(command).parse_args(arguments)
    assert parsed.settings == ["c.yaml", "data.template=a b"] and parsed.resume


def test_a_run_in_another_layout_has_the_variables_of_accelerate(tmp_path):
    file = ROOT / "deploy" / "slurm" / "train.sbatch"
    done, logs = run_job(file, tmp_path, "c.yaml", **SLURM, LAYOUT="zero3", SLURM_CPUS_PER_TASK="36")
    assert done.returncode == 0, done.stderr
    expected = {"ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_DEEPSPEED_ZERO_STAGE=3", "SRUN_CPUS_PER_TASK=36"}
    assert expected | {"OMP_NUM_THREADS=5"} <= set(logs["environment"])


def test_an_unknown_layout_is_one_line(tmp_path):
    done, logs = run_job(ROOT / "deploy" / "slurm" / "train.sbatch", tmp_path, "c.yaml", **SLURM, LAYOUT="fsdp")
    assert (done.returncode, logs) == (2, {})
    assert done.stderr == "LAYOUT=fsdp is not one of ddp, fsdp2, zero2, zero3\n"


def test_the_controller_of_a_comparison_hands_its_own_jobs_settings_to_no_run(tmp_path):
    done, logs = run_job(ROOT / "deploy" / "slurm" / "compare.sbatch", tmp_path, "fair.yaml", "jobs=16", **SLURM)
    assert done.returncode == 0, done.stderr
    assert logs["shadowtune"] == ["compare", "fair.yaml", "jobs=16"] and logs["variables"] == ["0"]


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_job_without_settings_is_one_line(file, tmp_path):
    done, logs = run_job(file, tmp_path, **SLURM)
    assert (done.returncode, logs) == (2, {})
    assert done.stderr.startswith("usage: sbatch ") and done.stderr.count("\n") == 1


def test_vllm_is_a_tested_version_and_keeps_its_own_dependencies():
    found = instructions(VLLM)
    image = next(rest for word, rest in found if word == "FROM")
    assert TESTED_VLLM.contains(image.removeprefix("vllm/vllm-openai:v"))
    (install,) = [rest for word, rest in found if word == "RUN" and "pip" in rest]
    assert "--no-deps" in install.split()
    entry = next(rest for word, rest in found if word == "ENTRYPOINT")
    assert '"--engine=vllm"' in entry and ("ENV", "VLLM_PYTHON=python3") in found


def test_the_manifest_fits_the_image():
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "vllm.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (command,) = [command for command in COMMANDS if command.name == "serve cloud"]
    arguments = build_parser(command).parse_args([*container["args"], "--engine=vllm"])
    assert "--max-model-len" in arguments.vllm_arguments.split()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert arguments.run[0].startswith(mounts["runs"]) and mounts["cache"] == "/home/shadowtune/.cache"
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}" in VLLM.read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 1000 and "--uid 1000" in VLLM.read_text()
