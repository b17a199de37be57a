"""The run directory: one training run, everything it was made from, and what it left.

config.yaml         the resolved settings           environment.json   commit, versions, hardware, date
metrics.jsonl       a line per log step             checkpoints/       whole checkpoints, for --resume
model/              the trained model               summary.json       what it cost
"""

import fcntl
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.training import TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.provenance import provenance

MAY_CHANGE = ("output", "epochs", "max_steps", "logging_steps", "save_steps", "eval_steps", "keep_checkpoints")
"""Settings that a resumed run may have otherwise than the interrupted one."""


class RunDirectory:
    """Paths and files of one run; a context manager that keeps other processes out.

    Raises:
        TrainingError: if the directory cannot be made, or another process is training in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise TrainingError(f"cannot write to the run directory {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise TrainingError(
                f"another process is training in {self.path}; wait for it or choose another output=..."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def begin(self, config: TrainConfig, resume: bool, overwrite: bool) -> str | None:
        """Prepare for training and return the checkpoint to resume from, or None to start anew.

        Raises:
            TrainingError: if a run is here and neither resuming nor overwriting was asked for.
            ConfigError: if the run to resume was made with other settings.
        """
        if overwrite and self.config_file.exists():
            for path in (self.checkpoints, self.model):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.config_file, self.metrics_file, self.summary_file):
                path.unlink(missing_ok=True)
        if self.config_file.exists():
            if not resume:
                raise TrainingError(
                    f"{self.path} holds a run already; pass --resume, --overwrite or another output=..."
                )
            self._check_same(config)
        dump_config(config, self.config_file)
        (self.path / "environment.json").write_text(json.dumps(provenance(), indent=2) + "\n")
        last = get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None
        if last is None:
            self.metrics_file.unlink(missing_ok=True)
        return last

    def read_config(self) -> TrainConfig:
        """Return the resolved settings of the run; raises CheckpointError if there is no run here."""
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path} is not a run directory: it has no config.yaml")
        return load_config(TrainConfig, self.config_file, [])

    def _check_same(self, config: TrainConfig) -> None:
        before, now = vars(self.read_config()), vars(config)
        changed = [name for name in now if name not in MAY_CHANGE and before[name] != now[name]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.path} with other settings: {', '.join(changed)} changed; start a new output=..."
            )


class MetricsFile(TrainerCallback):
    """Write each log line of the trainer to ``metrics.jsonl``, dropping on resume what comes after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training resumes from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= state.global_step]
        self.path.write_text("".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a") as handle:
                handle.write(json.dumps({"step": state.global_step, **logs}) + "\n")
