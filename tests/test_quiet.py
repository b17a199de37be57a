import logging
import subprocess
import sys

from shadowtune.quiet import TALKATIVE, quiet_imports


def test_importing_the_package_says_nothing():
    done = subprocess.run([sys.executable, "-c", "import shadowtune"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_bad_input_is_one_line_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "shadowtune", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "shadowtune: error: cannot read missing.yaml: No such file or directory\n"


def test_levels_come_back():
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.level for logger in loggers]
    with quiet_imports():
        assert {logger.level for logger in loggers} == {logging.ERROR}
    assert [logger.level for logger in loggers] == before
