"""Files, code and commands of the tutorial work one after another on a tiny base; so do the cells of the notebook."""

import json
import re
import shlex
from pathlib import Path

import pytest

from shadowtune.cli.main import COMMANDS, build_parser, main
from tests.support.runs import model_directory

ROOT = Path(__file__).parent.parent
PAGES = ("tutorial", "watching", "choosing", "troubleshooting")
TINY = {
    ", 1200)": ", 60)",
    ", 300)": ", 12)",
    "smollm2-135m": "tiny",
    "--deferral-rate 0.3": "--deferral-rate 0.3 --minimum 0",
    "--output runs/tickets": "--output runs/tickets max_steps=2 shadow_epochs=1 logging_steps=1",
}
"""Text of the tutorial -> what the test puts in its place, so that it takes seconds."""
SERVERS = ("shadowtune serve cloud", "shadowtune serve edge")
"""Commands that do not end; tests/cli/test_serve.py and test_serve_edge.py run them."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The code blocks of a page of the documentation, with their languages."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines of its bash blocks, without comments."""
    lines = [line for kind, body in blocks(page) if kind == "bash" for line in body.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_exists_with_its_options(page):
    for command in commands(page):
        words = shlex.split(command)
        if words[0] != "shadowtune":
            continue
        entry = next(each for each in COMMANDS if words[1:][: len(each.name.split())] == each.name.split())
        build_parser(entry).parse_intermixed_args(words[1 + len(entry.name.split()) :])


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_site_and_its_links_lead_to_files(page):
    assert f": {page}.md" in (ROOT / "mkdocs.yml").read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "docs" / f"{page}.md").read_text())
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_tutorial_leads_from_a_csv_to_both_models(tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    model_directory(tmp_path / "tiny")
    for kind, body in blocks("tutorial"):
        for text, smaller in TINY.items():
            body = body.replace(text, smaller)
        if kind == "python":
            exec(compile(body, "tutorial", "exec"), {})
        elif kind == "bash":
            for command in body.splitlines():
                if not command.startswith(SERVERS):
                    assert main(shlex.split(command)[1:]) == 0, f"{command}\n{capsys.readouterr().err}"
    assert (tmp_path / "tickets.csv").read_text().startswith("text,label\n")
    files = ("runs/tickets/report.html", "runs/tickets/model", "answers.jsonl", "tickets.gguf", "policy.json")
    assert [name for name in files if not (tmp_path / name).exists()] == []


def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    model_directory(tmp_path / "tiny")
    names = {}
    for cell in cells:
        for text, smaller in {'"smollm2-135m"': '"tiny"', "ROWS = 320": "ROWS = 16"}.items():
            cell = cell.replace(text, smaller)
        exec(compile(cell, "notebook", "exec"), names)
    assert names["scores"].keys() == {"base", "attached", "detached"}
    assert names["answers"].keys() == {"attached", "detached"}
    assert names["report"].is_file()
    assert not (tmp_path / "runs" / "notebook" / "checkpoints").exists()
    assert "validation loss" in capsys.readouterr().out
