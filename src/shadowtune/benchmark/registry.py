"""All benchmarks by name."""

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.train import TRAIN

BENCHES: dict[str, Bench] = {bench.name: bench for bench in (TRAIN,)}
"""What ``shadowtune bench`` can measure."""
