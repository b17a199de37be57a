"""Peak memory of each process while it trains, in the layout that the launcher asks for; loading is left out.

    export MALLOC_MMAP_THRESHOLD_=262144 OMP_NUM_THREADS=1
    torchrun --nproc-per-node 2 -m benchmarks.layout_memory
    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc-per-node 2 -m benchmarks.layout_memory

On a processor, under Linux. The peak is that of the second step and later ones, so gradients and the optimizer's state
are there; anonymous memory, without the pages of libraries. Each process prints a line.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shadowtune import ShadowConfig
from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.training import run

MODEL = "smollm2-135m"
ROWS, WORDS, STEPS = 16, 40, 3


class PeakMemory(TrainerCallback):
    """Starts the measurement before the second step, and prints its result after the last one."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the peak so far."""
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the peak of this process."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak, files, shared = (int(status[name].split()[0]) / 2**10 for name in ("VmHWM", "RssFile", "RssShmem"))
        sys.stdout.write(f"process {args.process_index}: {peak - files - shared:.0f} MiB\n")


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
    run.train(config, quiet=True, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "shadowtune-layout-memory")
