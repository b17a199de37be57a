import os
import subprocess
import sys

import pytest

from shadowtune.cli.command import ProgressBar
from shadowtune.cli.main import COMMANDS, main, use_plain_progress


def test_every_command_has_help_with_examples(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([*command.name.split(), "--help"])
        assert stop.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command.name} " in shown for command in COMMANDS)


def test_half_a_command_names_the_whole(capsys):
    assert main(["serve", "egde"]) == 2
    assert "did you mean serve edge" in capsys.readouterr().err


def test_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["info", "x", "--frobnicate"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shadowtune 0.")


def test_ctrl_c_is_a_line_and_code_130(monkeypatch, capsys):
    from shadowtune.cli import info

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "INFO", info.Command(info.add_arguments, interrupted, "examples:"))
    assert main(["info", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "shadowtune", "info", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("shadowtune: error: ")  # torchao, where installed, speaks first
    assert "Traceback" not in result.stderr


PROGRAM = """
import sys
from shadowtune.cli.main import make_stderr_resilient

make_stderr_resilient()
for _ in range(3):
    print("x" * 9000, file=sys.stderr, flush=True)
print("\\u00e4", file=sys.stderr)
print(sys.stderr.isatty(), sys.stderr.fileno())
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_written_is_dropped():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "False 2\n")


def test_what_can_be_written_is_written():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == ("x" * 9000 + "\n") * 3 + "\u00e4\n"


def test_without_a_terminal_progress_is_a_line_for_each_tenth(capsys):
    with ProgressBar() as bar:
        for done in range(1, 41):
            bar.show("evaluate run", done, 40)
    with ProgressBar(quiet=True) as bar:
        bar.show("evaluate run", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate run: 1 of 40"
    assert lines[-1] == "evaluate run: 40 of 40"
    assert len(lines) == 11


def test_bars_of_libraries_are_hidden_unless_there_is_a_terminal(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    use_plain_progress()
    assert os.environ.pop("TQDM_DISABLE") == "1"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    use_plain_progress()
    assert "TQDM_DISABLE" not in os.environ
