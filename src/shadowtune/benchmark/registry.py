"""All benchmarks by name."""

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.boundary import BOUNDARY
from shadowtune.benchmark.decode import DECODE
from shadowtune.benchmark.train import TRAIN

BENCHES: dict[str, Bench] = {bench.name: bench for bench in (TRAIN, BOUNDARY, DECODE)}
"""What ``shadowtune bench`` can measure."""
