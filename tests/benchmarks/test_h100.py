"""The script for the GPU, where there is none: every command that it gives must be one that can be planned."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, build_parser

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "h100.sh"
SMALL = {
    "MODEL": "tiny",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "TOKENS": "64",
    "LENGTH": "64",
    "WIDTH": "64",
    "VOCABULARY": "64",
    "LOSSES": "all-logits",
}


def commands_of(directory, code=0):
    """Run the script with a Python that writes its arguments down and exits with ``code``."""
    log, python = directory / "log", directory / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" >> {log}\nexit {code}\n')
    python.chmod(0o755)
    done = subprocess.run([SCRIPT], env={**os.environ, **SMALL, "PYTHON": str(python)}, check=False)
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
    assert seen == set(BENCHMARKS) - {"detached", "scaling", "plan"}


@pytest.mark.parametrize("code", [0, 2])
def test_what_does_not_fit_fails_the_script_but_not_the_rest_of_it(tmp_path, code):
    returned, lines = commands_of(tmp_path, code)
    written = [line for line in SCRIPT.read_text().splitlines() if line.startswith("bench ")]
    assert (returned, len(lines)) == (min(code, 1), len(written))
