import datetime
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from shadowtune import provenance as module
from shadowtune.provenance import peak_memory_mb, provenance


def test_it_says_when_with_what_and_on_what():
    facts = provenance()
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(facts["date"])
    assert abs(age.total_seconds()) < 60
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["shadowtune"] == version("shadowtune")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["processor"]


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    assert provenance()["versions"].keys() == {"torch"}


def test_the_commit_is_that_of_the_source_tree():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    commit = provenance()["commit"]
    assert commit is None if not head else head[:12] in commit


def test_an_installed_package_has_no_commit_even_inside_another_repository(monkeypatch, tmp_path):
    package = tmp_path / "env" / "lib" / "python3" / "site-packages" / "shadowtune" / "provenance.py"
    package.parent.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "somebody else's"], check=True)
    monkeypatch.setattr(module, "__file__", str(package))
    assert provenance()["commit"] is None


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", missing)
    assert provenance()["commit"] is None


def test_peak_memory_is_in_megabytes_and_remembers():
    before = peak_memory_mb()
    assert 50 < before < 100_000
    held = torch.ones(int(before + 100) * 2**18)  # 4 bytes each: more than the process ever held
    assert peak_memory_mb() > before + 50
    peak = peak_memory_mb()
    del held
    assert peak_memory_mb() >= peak
