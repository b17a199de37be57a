"""Trains several runs in one process of a launch, and writes what became of each; `torchrun` starts one per rank.

    torchrun --nproc-per-node 2 -m tests.slow.layouts.worker JOBS RESULTS

JOBS is a JSON list of {"name", "config": YAML file, "resume", "die_at": {"rank", "step"} or null}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ShadowtuneError
from shadowtune.training import callbacks
from shadowtune.training.run import train


class Die(TrainerCallback):
    """Ends one process without a word, between the backward pass and the optimizer step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.process_index == self.rank and state.global_step + 1 == self.step:
            os._exit(9)


def run(job: dict) -> str:
    """Train one run; returns "done", or why it was refused."""
    AcceleratorState._reset_state()
    watching = callbacks.GracefulInterrupt.watching
    if job.get("die_at"):
        die = Die(**job["die_at"])
        callbacks.GracefulInterrupt.on_pre_optimizer_step = staticmethod(die.on_pre_optimizer_step)
    try:
        train(load_config(TrainConfig, Path(job["config"]), []), resume=job.get("resume", False), quiet=True)
    except ShadowtuneError as error:
        return f"refused: {error}"
    except Exception:
        return f"failed: {traceback.format_exc()}"
    finally:
        callbacks.GracefulInterrupt.watching = watching
    return "done"


def main(jobs: str, results: str) -> None:
    outcomes = {}
    for job in json.loads(Path(jobs).read_text()):
        outcomes[job["name"]] = run(job)
        if os.environ.get("RANK", "0") == "0":
            Path(results).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
