"""Peak memory of each process until the first step of a training, and in later ones, in the launcher's layout.

    export MALLOC_MMAP_THRESHOLD_=262144 OMP_NUM_THREADS=1
    torchrun --nproc-per-node 2 -m benchmarks.layout_memory
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2
    torchrun --nproc-per-node 2 -m benchmarks.layout_memory
    FSDP_CPU_RAM_EFFICIENT_LOADING=true torchrun --nproc-per-node 2 -m benchmarks.layout_memory

On a processor, under Linux; anonymous memory, and resident pages of the checkpoint: weights that were read in their own
precision are such pages. "loading" is the largest of samples every 20 ms from the start of the run to its first step:
base, start of the shadow, checks of the inputs, division among the processes. "training" is the peak of the second step
and later ones, so gradients and the optimizer's state are there. Each process prints a line.
"""

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shadowtune import ShadowConfig
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.training import run

MODEL = "smollm2-135m"
ROWS, WORDS, STEPS = 16, 40, 3


def status() -> dict[str, float]:
    """Return the sizes in this process's status, in MiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 2**10 for words in lines if words[-1] == "kB"}


def checkpoint_pages() -> float:
    """Return the resident pages of mapped safetensors files that this process has not written to, in MiB."""
    pages, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counts = words[-1].endswith(".safetensors")
        elif counts and words[0] in ("Rss:", "Anonymous:"):
            pages += int(words[1]) if words[0] == "Rss:" else -int(words[1])
    return pages / 2**10


class Sampler(threading.Thread):
    """Remembers the largest memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Measure every 20 ms."""
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, status()["RssAnon"] + checkpoint_pages())


SAMPLER = Sampler()


class PeakMemory(TrainerCallback):
    """Ends the first measurement before the first step, begins the second one after it, and prints both."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the peak so far."""
        SAMPLER.stopped.set()
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the peaks of this process."""
        sizes = status()
        training = sizes["VmHWM"] - sizes["RssFile"] - sizes["RssShmem"] + checkpoint_pages()
        sys.stdout.write(f"process {args.process_index}: loading {SAMPLER.peak:.0f} MiB, training {training:.0f} MiB\n")


class MeasuredTrainer(run.ShadowTrainer):
    """The trainer of a run, with the measurement."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_callback(PeakMemory())


def main(directory: Path) -> None:
    """Train for some steps in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = directory / "rows.jsonl"
    text = " ".join(str(number) for number in range(WORDS))
    rows.write_text("".join(json.dumps({"prompt": f"{index}:", "completion": text}) + "\n" for index in range(ROWS)))
    run.ShadowTrainer = MeasuredTrainer  # type: ignore[misc]
    config = TrainConfig(
        model=MODEL,
        output=str(directory / "run"),
        data=DataConfig(train=str(rows)),
        shadow=ShadowConfig.recommended(),
        batch_size=1,
        max_steps=STEPS,
        keep_checkpoints=0,
    )
    SAMPLER.start()
    run.train(config, quiet=True, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "shadowtune-layout-memory")
