"""The script for a GPU, where there is none: every command that it gives must be one that can be planned."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, build_parser

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
SMALL = {
    "MODEL_3B": "tiny",
    "BATCH_3B": "1",
    "LENGTH_3B": "16",
    "FUSED": "dora",
    "MODEL": "tiny",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "TOKENS": "64",
    "LENGTH": "64",
    "WIDTH": "64",
    "VOCABULARY": "64",
    "LOSSES": "all-logits",
}


def commands_of(directory, code=0, **changes):
    """Run the script with a Python that writes its arguments down and exits with ``code``."""
    log, python = directory / "log", directory / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" >> {log}\nexit {code}\n')
    python.chmod(0o755)
    done = subprocess.run([SCRIPT], env={**os.environ, **SMALL, **changes, "PYTHON": str(python)}, check=False)
    return done.returncode, log.read_text().splitlines()


def test_every_command_of_the_script_can_be_planned(tmp_path):
    code, lines = commands_of(tmp_path)
    assert code == 0
    seen = set()
    for line in lines:
        source, dash, module, *command = line.split()
        assert (source, dash, module) == ("src", "-m", "benchmarks")
        arguments = vars(build_parser().parse_args(command))
        bench = BENCHMARKS[command[0]]
        names = [field.name for field in dataclasses.fields(bench.settings)]
        settings = bench.settings(**{name: arguments[name] for name in names})
        assert bench.plan(settings).cases
        assert (settings.repeats, settings.device, settings.dtype) == (3, "cpu", "float32")
        assert (arguments["out"], arguments["quiet"]) == ("benchmarks/results", True)
        seen.add(command[0])
    assert seen == set(BENCHMARKS) - {"detached", "scaling", "plan", "vllm"}


@pytest.mark.parametrize("code", [0, 2])
def test_what_does_not_fit_fails_the_script_but_not_the_rest_of_it(tmp_path, code):
    returned, lines = commands_of(tmp_path, code)
    commands = ("bench ", "train_3b ", 'if [ -n "$FUSED" ]; then train_3b ')
    written = [line for line in SCRIPT.read_text().splitlines() if line.strip().startswith(commands)]
    assert (returned, len(lines)) == (min(code, 1), len(written) - 1)  # the function has one, too


def test_one_part_is_the_shape_of_pefts_own_benchmark(tmp_path):
    _, lines = commands_of(tmp_path, PARTS="3b", MODEL_3B="llama-3.2-3b-random", BATCH_3B="4", LENGTH_3B="768")
    assert {line.split()[3] for line in lines} == {"train", "memory"}
    assert all("--model llama-3.2-3b-random --batch 4" in line and " 768 " in line for line in lines)
    baselines = [line.split("--baselines ")[1].split()[0] for line in lines if " train --model" in line]
    assert baselines == ["lora", "dora", "peft-shadow", "shadow-recommended"]
    (tmp_path / "without").mkdir()
    _, fewer = commands_of(tmp_path / "without", PARTS="3b", FUSED="")
    assert len(fewer) == len(lines) - 2
