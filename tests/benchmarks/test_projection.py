"""The projection, on passes whose times are known."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write_passes(file):
    """Write passes of 10 ms a token, drafts of 1 ms a token, a base of 8 ms; and an older run that is not to count."""
    rows = [
        {"date": "1", "case": "tokens=1", "baseline": "base", "tokens_per_second": 1, "baseline_tokens_per_second": 1}
    ]
    for tokens in (1, 4, 16):
        for baseline, rate in (("base", 125), ("drafting", 1000)):
            rows.append(
                {"date": "2", "case": f"tokens={tokens}", "baseline": baseline, "tokens_per_second": 100 * tokens}
                | {"baseline_tokens_per_second": rate}
            )
    with file.open("w") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_it_tells_what_the_best_draft_would_give(tmp_path):
    write_passes(tmp_path / "passes.csv")
    command = [sys.executable, "-m", "benchmarks.projection", "--passes", str(tmp_path / "passes.csv")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True, timeout=120)
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in done.stdout.splitlines() if line.startswith("| 0")
    }
    # A pass takes 1 whatever its tokens, a draft 0.1: of (1 + ... + a^g) / (1 + g / 10) for a = 0.5, g = 2 is the best.
    assert rows["0.5"][0].strip() == "1.46 / 1.17 (2)"
    over_attached = [float(cells[1].split("/")[0]) for cells in rows.values()]
    assert over_attached == sorted(over_attached)
