"""What the container files name exists: files, extras, commands, options, the path of the health check."""

import re
from pathlib import Path

import pytest

from shadowtune.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))


def instructions(file):
    """Every instruction on one line, by its name."""
    lines = [line for line in file.read_text().replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_both_sides_have_one():
    assert [file.name for file in FILES] == ["cloud.Dockerfile", "edge.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there(file):
    copied = [name for word, rest in instructions(file) if word == "COPY" for name in rest.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_installed_are_pinned_extras_of_ours(file):
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    runs = " && ".join(rest for word, rest in instructions(file) if word == "RUN" and "pip" in rest)
    (asked,) = re.findall(r"\.\[([\w,]+)\]", runs)
    assert "serve" in asked.split(",") and set(asked.split(",")) <= known
    assert runs.count("pip install") == runs.count("-c constraints.txt")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
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
