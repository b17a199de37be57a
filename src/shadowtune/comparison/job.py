"""A single run of a comparison: what to train, what to evaluate, and where its files are."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shadowtune.config.training import DataConfig, TrainConfig
from shadowtune.errors import CheckpointError
from shadowtune.model.files import writing_into

UNREADABLE = "unreadable"
"""In place of a digest of rows that cannot be read: the run says why."""


@functools.cache
def results_version() -> str:
    """Return what results of another version differ in: that of this package."""
    return importlib.metadata.version("shadowtune")


@dataclass(frozen=True)
class Request:
    """One evaluation of a trained model."""

    task: str
    """Whose rows; the name in the comparison."""
    mode: str
    """attached, detached or base."""
    split: str
    limit: int | None
    batch_size: int
    data: DataConfig
    """How the task's rows become prompts."""
    source: str | None = None
    """Held-out rows that are no split of the task's data set."""
    rows: str = ""
    """Digest of the rows, so that results on others are not taken for these."""

    @property
    def file(self) -> str:
        """Name of the file that keeps the result in the run directory."""
        settings = differences(self)
        return f"evaluation-{self.mode}-{self.task}-{self.split}-{digest(settings)}.json"


@dataclass(frozen=True)
class TextRequest:
    """The perplexity of a trained model, and of its base, on a text."""

    data: DataConfig
    """The text, cut into blocks."""
    limit: int
    """Blocks."""
    batch_size: int
    rows: str = ""
    """Digest of the text."""

    @property
    def file(self) -> str:
        """Name of the file that keeps the result in the run directory."""
        return f"forgetting-{digest(differences(self))}.json"


@dataclass(frozen=True)
class Job:
    """One training run with its evaluations, or evaluations of the bare base."""

    stage: Literal["trial", "final"]
    """A trial of the sweep, or a run that counts."""
    task: str
    method: str
    seed: int
    config: TrainConfig
    """With the directory of the comparison's runs as ``output``; the run's own is ``path``."""
    trains: bool
    """Whether there is anything to train: not for the base."""
    requests: tuple[Request, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    """What the sweep chose or tries, by dotted keys."""
    size: str | None = None
    """What the budget chose, such as "lora.rank 15"."""
    columns: tuple[str, ...] = ("parameters",)
    """The columns of the report that it counts in: equal parameters and steps, equal time, equal memory."""
    text: TextRequest | None = None
    """What forgetting is measured on."""
    rows: str = ""
    """Digest of the training rows, and of the validation rows that training chooses by."""
    row_counts: tuple[int, int] = (0, 0)
    """How many of both there are."""
    asked: dict[str, int] = field(default_factory=dict)
    """Limits of rows that the settings name: training, validation."""

    @functools.cached_property
    def name(self) -> str:
        """Name that says what it is, and changes with any setting of the training, its rows and our version."""
        settings = differences(dataclasses.replace(self.config, output=TrainConfig.output))
        settings |= {"rows": self.rows, "version": results_version()}
        trained = f"seed-{self.seed}" if self.trains else "untrained"
        return f"{self.task}/{self.method}/{trained}-{digest(settings)}"

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.config.output) / self.name

    @property
    def result_file(self) -> Path:
        """The row of results; there when the job has been done."""
        return self.path / f"{self.stage}.json"

    def result(self) -> dict[str, Any] | None:
        """Return the row that the job left, None if there is none or the job has changed since."""
        if not self.result_file.is_file():
            return None
        row = read_json(self.result_file)
        return {**row, **self._place()} if row["requests"] == self.files else None

    @property
    def files(self) -> list[str]:
        """Names of the files of results that the run directory gets."""
        return [*(request.file for request in self.requests), *([] if self.text is None else [self.text.file])]

    def _place(self) -> dict[str, Any]:
        """What a row says of the comparison rather than of the run, which may be in several columns."""
        return {"setting": self.setting, "size": self.size, "columns": list(self.columns)}

    def is_done(self) -> bool:
        """Whether the job has been done, without failing."""
        row = self.result()
        return row is not None and row["error"] is None

    def write(self, **found: Any) -> None:
        """Write the row of results, whole or not at all."""
        row = {
            "run": self.name,
            "stage": self.stage,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            **self._place(),
            "version": results_version(),
            "rows": self.rows,
            "training_rows": self.row_counts[0],
            "validation_rows": self.row_counts[1],
            "asked": self.asked,
            "requests": self.files,
            "error": None,
            **found,
            "config": asdict(self.config),
        }
        write_json(self.result_file, row)


def read_json(file: Path) -> Any:
    """Read a file of results; raises CheckpointError naming it if it is damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> CheckpointError:
    """Return the error that says so of a file of results."""
    return CheckpointError(f"{file} is damaged ({' '.join(str(error).split())}); delete it")


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all, making the directory."""
    with writing_into(file.parent) as staging:
        (staging / file.name).write_text(json.dumps(value) + "\n")


def differences(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, nested ones likewise.

    What names a run by its settings should not change when a later version adds a setting.
    """
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = vars(settings)[entry.name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if dataclasses.is_dataclass(value):
            if inner := differences(value):
                found[entry.name] = inner
        elif value != default:
            found[entry.name] = value
    return found


def digest(settings: Any) -> str:
    """Return eight hexadecimal digits that change with the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
