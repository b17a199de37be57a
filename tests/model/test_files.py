import signal
import subprocess
import sys

import pytest

from shadowtune.errors import CheckpointError
from shadowtune.model import files
from shadowtune.model.files import OLD, exchange, recover_directory, replace_directory, staging_of
from shadowtune.model.loading import read_config
from tests.support.shadows import perturbed_model

KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path

specification = importlib.util.spec_from_file_location("replacement", sys.argv[4])  # by itself: without torch
replacement = importlib.util.module_from_spec(specification)
specification.loader.exec_module(replacement)
if sys.argv[2] == "renames":
    replacement.exchange = lambda first, second: False
rename, count = os.replace, 0

def replace_or_die(*names):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)

os.replace = replace_or_die
replacement.replace_directory(Path(sys.argv[1]))
"""


@pytest.fixture(params=["exchange", "renames"])
def way(request, tmp_path, monkeypatch):
    """How names are exchanged: in one step, or in two where the file system has no such step."""
    if request.param == "renames":
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    else:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        if not exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system does not exchange names in one step")
        for name in ("a", "b"):
            (tmp_path / name).rmdir()
    return request.param


def staged(target, old=True):
    """A target with old contents and new ones beside it."""
    for directory, text in ([(target, "old")] if old else []) + [(staging_of(target), "new")]:
        directory.mkdir(parents=True)
        (directory / "file").write_text(text)
        (directory / text).touch()


@pytest.mark.parametrize("old", [True, False])
def test_the_new_directory_takes_the_name_and_nothing_else_is_left(old, way, tmp_path):
    staged(tmp_path / "model", old)
    replace_directory(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["file", "new"]


def kill(target, way, count):
    command = [sys.executable, "-c", KILLED, str(target), way, str(count), files.__file__]
    return subprocess.run(command, check=False).returncode


def test_an_exchange_in_one_step_has_no_moment_without_a_directory(way, tmp_path):
    if way == "renames":
        pytest.skip("two steps")
    staged(tmp_path / "model")
    assert kill(tmp_path / "model", way, 1) == 0, "nothing is renamed by itself"
    assert (tmp_path / "model" / "file").read_text() == "new"


@pytest.mark.parametrize(("count", "text"), [(1, "old"), (2, "new")])
def test_after_a_kill_at_either_rename_there_is_a_whole_directory(count, text, tmp_path):
    staged(tmp_path / "model")
    assert kill(tmp_path / "model", "renames", count) == -signal.SIGKILL
    assert (tmp_path / "model").exists() == (count == 1)
    recover_directory(tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == text
    assert (tmp_path / "model" / text).exists()


def test_without_the_new_directory_the_old_one_is_put_back(tmp_path):
    old = staging_of(tmp_path / "model").with_name("model" + OLD)
    old.mkdir(parents=True)
    (old / "file").write_text("old")
    recover_directory(tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_a_directory_that_was_never_finished_is_not_taken(tmp_path):
    staged(tmp_path / "model", old=False)
    recover_directory(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_shadow_is_read_after_such_a_kill(tmp_path):
    target = tmp_path / "model"
    perturbed_model().save_pretrained(target)
    perturbed_model(alpha=0.9).save_pretrained(staging_of(target))
    assert kill(target, "renames", 2) == -signal.SIGKILL
    assert read_config(str(target)).shadow_config.alpha == 0.9
    with pytest.raises(CheckpointError):
        read_config(str(tmp_path / "other"))
