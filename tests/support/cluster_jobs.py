"""Jobs of a comparison whose work takes no time, in a module that a process imports quickly."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from shadowtune.errors import ShadowtuneError


@dataclass(frozen=True)
class QuickJob:
    """The part of ``comparison.job.Job`` that execution uses."""

    folder: Path
    task: str
    method: str = "shadow"
    stage: str = "final"

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/seed-1"

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def result_file(self) -> Path:
        return self.path / "final.json"

    def result(self):
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None

    def is_done(self) -> bool:
        row = self.result()
        return row is not None and row["error"] is None

    def write(self, **found) -> None:
        row = {"run": self.name, "task": self.task, "method": self.method, "stage": self.stage, "setting": {}}
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "new"
        temporary.write_text(json.dumps({**row, "error": None, **found}))
        temporary.rename(self.result_file)


def work(job: QuickJob) -> None:
    """What the jobs do, by the name of their task."""
    if job.task == "wrong":
        raise ShadowtuneError("there is no such base")
    if job.task == "broken":
        raise ZeroDivisionError("1 / 0")
    if job.task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.task == "slow":
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path / "began").write_text(str(os.getpid()))
        while not (job.path / "go on").exists():
            time.sleep(0.05)
    job.write(seconds=1.0, evaluations=[], training=None, provenance={"pid": os.getpid()})
