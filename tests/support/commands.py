"""A base on disk and rows to learn, small enough to train in seconds from the command line."""

import json
from pathlib import Path

from tests.support.runs import model_directory

WORDS = ("one", "two", "ten", "red", "sea", "day", "sun", "ice")
ROWS = [{"prompt": f"say {word}", "completion": word} for word in WORDS]


def save_base(directory: Path) -> Path:
    """Save a tiny base with its tokenizer, as a user has one on disk."""
    return Path(model_directory(directory))


def write_rows(file: Path, rows: list[dict] | None = None) -> Path:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return file


def write_config(file: Path, base: Path, data: Path, output: Path, extra: str = "") -> Path:
    """Write the settings of a run of a few steps; ``extra`` is more YAML."""
    file.write_text(
        f"model: {base}\noutput: {output}\ndata:\n  train: {data}\n"
        "shadow: {rank: 4, update_width: 3, alpha: 1.0, dropout: 0.0}\nlora: {rank: 4}\n"
        f"max_steps: 4\nbatch_size: 4\nlogging_steps: 1\noptimizer: {{learning_rate: 1e-2}}\n{extra}"
    )
    return file
