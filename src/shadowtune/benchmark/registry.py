"""All benchmarks by name."""

from shadowtune.benchmark.bench import Bench
from shadowtune.benchmark.boundary import BOUNDARY
from shadowtune.benchmark.decode import DECODE
from shadowtune.benchmark.detached import DETACHED
from shadowtune.benchmark.evaluate import EVALUATE
from shadowtune.benchmark.head import HEAD
from shadowtune.benchmark.memory import MEMORY
from shadowtune.benchmark.passes import PASSES
from shadowtune.benchmark.scaling import SCALING
from shadowtune.benchmark.serving import SERVING
from shadowtune.benchmark.speculate import SPECULATE
from shadowtune.benchmark.train import TRAIN

BENCHES: dict[str, Bench] = {
    bench.name: bench
    for bench in (TRAIN, BOUNDARY, HEAD, DECODE, EVALUATE, SPECULATE, PASSES, SERVING, DETACHED, MEMORY, SCALING)
}
"""What ``shadowtune bench`` can measure."""
