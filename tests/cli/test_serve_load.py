import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx2")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


def test_a_few_seconds_of_load_lose_no_request(shadow_run, tmp_path):
    """The script that runs for half an hour, for some seconds: memory may still grow, requests may not be lost."""
    arguments = ["--minutes", "0.08", "--clients", "4", "--json", str(tmp_path / "load.json")]
    command = [sys.executable, str(SCRIPT), str(shadow_run), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["died"] == [], done.stderr
    assert found["requests"]["answered"] > 0
    assert not [name for name in found["requests"] if name[0] == "5" or name.startswith(("lost", "cut"))]
    assert len(found["rows"]) > 3
