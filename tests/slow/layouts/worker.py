"""Trains several runs in one process of a launch, and writes what became of each; `torchrun` starts one per rank.

    torchrun --nproc-per-node 2 -m tests.slow.layouts.worker JOBS OUTCOMES

JOBS is a JSON list of {"name", "config": YAML file, "resume": bool, "die_at": {"rank", "step"} or null}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState

from shadowtune.config.loading import load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ShadowtuneError
from shadowtune.training.callbacks import GracefulInterrupt
from shadowtune.training.run import train


def die(rank: int, step: int):
    """A callback's method that ends one process without a word, before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == rank and state.global_step + 1 == step:
            os._exit(9)

    return on_pre_optimizer_step


def run(job: dict) -> str:
    """Train one run; returns "done", why it was refused, or how it failed."""
    AcceleratorState._reset_state()
    if job.get("die_at"):
        GracefulInterrupt.on_pre_optimizer_step = die(**job["die_at"])
    try:
        train(load_config(TrainConfig, Path(job["config"]), []), resume=job.get("resume", False), quiet=True)
    except ShadowtuneError as error:
        if job.get("die_at") and "another process" in str(error):
            sys.exit(str(error))
        return f"refused: {error}"
    except Exception:
        return f"failed: {traceback.format_exc()}"
    return "done"


def main(jobs: str, results: str) -> None:
    outcomes = {}
    for job in json.loads(Path(jobs).read_text()):
        outcomes[job["name"]] = run(job)
        if os.environ["RANK"] == "0":
            Path(results).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
