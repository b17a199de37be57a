"""Every command of the README runs, and says what the README says it does."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shadowtune.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, body in BLOCKS
    if kind == "bash"
    for line in body.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
LONG = ("shadowtune demo", "python -m benchmarks", "accelerate launch")
"""Commands that are run elsewhere, smaller: tests/cli/test_demo.py, tests/benchmarks, tests/training."""


def test_the_first_command_comes_within_twenty_lines():
    assert README[: README.index("```bash")].count("\n") <= 20


def test_every_make_target_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert named
    assert set(named) <= set(targets)


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.model
def test_the_commands_of_the_readme_run_one_after_another(tmp_path, monkeypatch):
    run = [command for command in COMMANDS if command.startswith("shadowtune ") and not command.startswith(LONG)]
    assert len(run) >= 4
    monkeypatch.chdir(tmp_path)
    for command in run:
        assert main(shlex.split(command)[1:]) == 0, command


@pytest.mark.model
def test_the_python_of_the_readme_runs(tmp_path):
    python = [body for kind, body in BLOCKS if kind == "python"]
    assert len(python) >= 2
    program = f"for body in {python!r}:\n    exec(compile(body, 'README.md', 'exec'), {{'__name__': '__main__'}})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
