"""Projection of the speedup by speculative decoding: an extrapolation, not a measurement. Prints a Markdown table.

    python -m benchmarks.projection                               # passes as in benchmarks/results/passes.csv
    python -m benchmarks.projection --passes DIR/passes.csv

A round of g drafts, each accepted with probability a if those before it were, generates 1 + a + ... + a^g tokens and
takes a pass over g + 1 tokens and g steps of the drafter. The first column has times measured on this machine. The
others are Qwen3-8B on a device that is bound by reading the weights once a pass, whatever the (few) tokens in it: times
are proportional to the bytes that are read. A shadow of 28 short layers will take longer than that.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.bases import base_config
from shadowtune.model.speculation.draft_length import Costs

LONGEST = 16
ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)
Time = Callable[[int], float]
"""Time of a pass over so many tokens, in units of a pass of the attached model over one token."""


def measured(file: Path) -> tuple[Time, Time, float]:
    """Return the times of passes and drafts of the latest run, and that of the base over one token."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    passes, drafts, base = {}, {}, 0.0
    for row in rows:
        tokens = int(row["case"].removeprefix("tokens="))
        passes[tokens] = tokens / float(row["tokens_per_second"])
        if row["baseline"] == "drafting":
            drafts[tokens] = tokens / float(row["baseline_tokens_per_second"])
        if row["baseline"] == "base" and tokens == 1:
            base = 1 / float(row["baseline_tokens_per_second"])
    return timed(passes, passes[1]), timed(drafts, passes[1]), base / passes[1]


def timed(seconds: dict[int, float], unit: float) -> Time:
    """Interpolate measured seconds linearly, in units of ``unit`` seconds."""
    costs = Costs(table=tuple(sorted(seconds.items())))
    return lambda tokens: costs.pass_time(tokens) * seconds[1] / unit


def reshaped(config: PreTrainedConfig, **sizes: int) -> Qwen3Config:
    """Return a copy of the config with other sizes."""
    return Qwen3Config(**{**config.to_dict(), "layer_types": None, **sizes})


def weights_read(config: PreTrainedConfig) -> int:
    """Return the number of weights that a pass reads: all but the embedding's."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    return sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel()


def speedup(acceptance: float, passing: Time, drafting: Time) -> tuple[float, int]:
    """Return the tokens per unit of time with the best number of drafts, and that number."""

    def rate(drafts: int) -> float:
        tokens = sum(acceptance**position for position in range(drafts + 1))
        return tokens / (passing(drafts + 1) + (drafting(drafts) if drafts else 0.0))

    best = max(range(LONGEST), key=rate)
    return rate(best), best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=Path, default=Path(__file__).parent / "results" / "passes.csv")
    parser.add_argument("--draft-vocabulary", type=int, default=4096)
    arguments = parser.parse_args()
    passing, drafting, base = measured(arguments.passes)
    large = base_config("qwen3-8b-random")
    narrow = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    small, block = reshaped(large, **narrow), reshaped(large, num_hidden_layers=1)
    head = arguments.draft_vocabulary * large.hidden_size
    base_weights = weights_read(large)
    columns: dict[str, tuple[Time, Time, float]] = {"SmolLM2-135M here, measured passes": (passing, drafting, base)}
    for name, config in (("8B, shadow of 0.6B", small), ("8B, shadow of one block", block)):
        backbone = weights_read(config) - config.vocab_size * config.hidden_size
        unit = base_weights + backbone
        columns[name] = (lambda _: 1.0, lambda g, d=(backbone + head) / unit: g * d, base_weights / unit)
    print("| acceptance | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for acceptance in ACCEPTANCE:
        cells = []
        for passes, drafts, bare in columns.values():
            rate, best = speedup(acceptance, passes, drafts)
            cells.append(f"{rate:.2f} / {rate * bare:.2f} ({best})")
        print(f"| {acceptance:g} | " + " | ".join(cells) + " |")
    print("\nOver plain attached decoding / over the bare base (drafts a round).")


if __name__ == "__main__":
    main()
