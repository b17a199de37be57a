"""The run directory: one training run, everything it was made from, and what it left.

config.yaml         the resolved settings           environment.json   commit, versions, hardware, date
inputs.json         digests of base, tokenizer and rows, compared on --resume
metrics.jsonl       a line per log step             checkpoints/       whole checkpoints, for --resume
model/              the trained model               summary.json       what it cost; there when the run has finished
tensorboard/        the same lines for TensorBoard     shadow/            the run in which the shadow learned alone
drafting/           metrics of the drafter's epochs
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer_utils import get_last_checkpoint

from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.model.checkpoint import writing_into
from shadowtune.model.replacement import recover_directory
from shadowtune.provenance import provenance
from shadowtune.training.checkpoints import check_checkpoint
from shadowtune.training.inputs import TrainingInputs
from shadowtune.training.shadow_first import DIRECTORY

MAY_CHANGE = (
    "output",
    "epochs",
    "max_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "keep_checkpoints",
    "tensorboard",
)
"""Settings that a resumed run may have otherwise than the interrupted one."""


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context that makes the directory and keeps other runs out of it, until it ends or the process dies.

        Raises:
            TrainingError: if the directory cannot be made, or another run is training in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"another process is training in {self.path}; wait for it or choose another output=..."
            ) from None
        except OSError as error:
            raise TrainingError(f"cannot write to the run directory {self.path}: {error.strerror}") from None
        with lock:
            yield

    def check(self, config: TrainConfig, resume: bool, overwrite: bool) -> None:
        """Refuse to train over a run that is here.

        Raises:
            TrainingError: if a run is here and neither resuming nor overwriting was asked for.
            ConfigError: if the run to resume was made with other settings.
            CheckpointError: if the checkpoint to resume from is damaged.
        """
        recover_directory(self.model)
        if overwrite or not (self.config_file.exists() or self.last_checkpoint()):
            return
        if not resume:
            raise TrainingError(f"{self.path} holds a run already; pass --resume, --overwrite or another output=...")
        before, now = vars(self.read_config()), vars(config)
        changed = [name for name in now if name not in MAY_CHANGE and before[name] != now[name]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.path} with other settings: {', '.join(changed)} changed; start a new output=..."
            )
        if (last := self.last_checkpoint()) is not None:
            check_checkpoint(Path(last))

    def check_inputs(self, inputs: TrainingInputs) -> None:
        """Refuse to resume with other rows, base or tokenizer than those that this run, or a part of it, began with.

        Raises:
            ConfigError: naming what has changed.
            CheckpointError: if it was not recorded, or the record is damaged.
        """
        if self.last_checkpoint() is not None:
            inputs.check(self.path)
        first = RunDirectory(self.path / DIRECTORY)  # the shadow's own run
        if first.last_checkpoint() is not None or first.model.is_dir():
            inputs.check(first.path)

    def begin(self, config: TrainConfig, resume: bool) -> None:
        """Write the settings and the environment; unless resuming, remove what an earlier run left.

        Raises:
            ShadowtuneError: if a file cannot be written or removed.
        """
        try:
            if not resume:
                for directory in (self.checkpoints, self.model, self.tensorboard):
                    if directory.exists():
                        shutil.rmtree(directory)
            if self.last_checkpoint() is None:
                self.metrics_file.unlink(missing_ok=True)
            self.summary_file.unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot clear the run directory {self.path}: {error}") from None
        dump_config(config, self.config_file)
        with writing_into(self.path) as staging:
            (staging / self.environment_file.name).write_text(json.dumps(provenance(), indent=2) + "\n")

    def last_checkpoint(self) -> str | None:
        """Return the latest checkpoint, or None if there is none."""
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether a run with exactly these settings has left its model here."""
        recover_directory(self.model)
        if not (self.summary_file.is_file() and self.config_file.is_file() and self.model.is_dir()):
            return False
        return replace(self.read_config(), output=config.output) == config

    def read_config(self) -> TrainConfig:
        """Return the resolved settings of the run; raises CheckpointError if there is no run here."""
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path} is not a run directory: it has no config.yaml")
        return load_config(TrainConfig, self.config_file, [])
