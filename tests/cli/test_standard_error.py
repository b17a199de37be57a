import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from shadowtune.cli.standard_error import let_standard_error_fail

let_standard_error_fail()
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
