"""One run of a comparison: its training settings, evaluations, examples and files."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shadowtune.config.data import DataConfig
from shadowtune.config.training import TrainConfig
from shadowtune.data.dataset import Dataset
from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.model.files import writing_into

UNREADABLE = "unreadable"
"""Digest of examples that cannot be read; the run reports why."""


@functools.cache
def results_version() -> str:
    """Return the version that results are valid for: that of this package."""
    return importlib.metadata.version("shadowtune")


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation of a trained model. Field names are part of the names of result files."""

    task: str
    """Name of the evaluated task in the comparison."""
    mode: str
    """attached, detached or base."""
    split: str
    limit: int | None
    batch_size: int
    data: DataConfig
    """How the task's examples become prompts."""
    source: str | None = None
    """A data set of held-out examples that is no split of the task's data set."""
    rows: str = ""
    """Digest of the examples, so that results on others are not taken for these."""

    @property
    def file(self) -> str:
        """Name of the result file in the run directory."""
        settings = differences(self)
        return f"evaluation-{self.mode}-{self.task}-{self.split}-{digest(settings)}.json"


@dataclass(frozen=True)
class PerplexityRequest:
    """The perplexity of a trained model, and of its base, on a text. Field names are part of the file name."""

    data: DataConfig
    """The text, cut into blocks."""
    limit: int
    """Number of blocks."""
    batch_size: int
    rows: str = ""
    """Digest of the text."""

    @property
    def file(self) -> str:
        """Name of the result file in the run directory."""
        return f"forgetting-{digest(differences(self))}.json"


@dataclass(frozen=True)
class Job:
    """One training run with its evaluations, or evaluations of the bare base."""

    stage: Literal["trial", "final"]
    """A trial of the sweep, or a run of the report."""
    task: str
    method: str
    seed: int
    config: TrainConfig
    """Its ``output`` is the directory of all runs of the comparison; ``path`` is that of this run."""
    trains: bool
    """False for the bare base."""
    requests: tuple[EvaluationRequest, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    """Settings that the sweep tries or chose, by dotted keys."""
    size: str | None = None
    """Size that the budget chose, such as "lora.rank 15"."""
    columns: tuple[str, ...] = ("parameters",)
    """The columns of the report that it is in: equal parameters and steps, equal time, equal memory."""
    text: PerplexityRequest | None = None
    """The text that forgetting is measured on."""
    rows: str = ""
    """Digest of the training examples, and of the validation examples that training selects by."""
    row_counts: tuple[int, int] = (0, 0)
    """Numbers of both."""
    asked: dict[str, int] = field(default_factory=dict)
    """Limits of training and validation examples that the settings name."""

    @functools.cached_property
    def name(self) -> str:
        """Readable name that changes with the training settings, the examples and our version."""
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
        """The file of the result row; it exists when the job is done or has failed."""
        return self.path / f"{self.stage}.json"

    @property
    def files(self) -> list[str]:
        """Names of the result files of all requests."""
        return [*(request.file for request in self.requests), *([] if self.text is None else [self.text.file])]

    def result(self) -> dict[str, Any] | None:
        """Return the result row; None if there is none or the requests have changed since."""
        if not self.result_file.is_file():
            return None
        row = read_json(self.result_file)
        return {**row, **self._in_comparison()} if row["requests"] == self.files else None

    def is_done(self) -> bool:
        """Return whether there is a result that is no failure."""
        row = self.result()
        return row is not None and row["error"] is None

    def write(self, **found: Any) -> None:
        """Write the result row atomically."""
        row = {
            "run": self.name,
            "stage": self.stage,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            **self._in_comparison(),
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

    def _in_comparison(self) -> dict[str, Any]:
        """Columns that describe the comparison rather than the run, which may be in several columns."""
        return {"setting": self.setting, "size": self.size, "columns": list(self.columns)}


class RowDigests:
    """Digests and numbers of the examples that runs read; each way of reading them is digested once.

    Args:
        held_out: whether held-out examples may be read; their digest is empty if not.
    """

    def __init__(self, held_out: bool = True) -> None:
        self._held_out = held_out
        self._known: dict[str, tuple[str, int]] = {}

    def training(self, data: DataConfig) -> tuple[str, int]:
        """Return digest and number of the training examples."""
        return self._digest(f"train {data!r}", lambda: Dataset.open(data).training_rows())

    def validation(self, data: DataConfig) -> tuple[str, int]:
        """Return digest and number of the validation examples that training reads."""
        return self._digest(f"validation {data!r}", lambda: Dataset.open(data).validation_rows() or [])

    def held_out(self, data: DataConfig, split: str, source: str | None, limit: int | None) -> tuple[str, int]:
        """Return digest and number of held-out examples."""
        if not self._held_out:
            return "", 0
        key = f"held out {data!r} {split} {source} {limit}"
        return self._digest(key, lambda: Dataset.open(data).held_out(split, source, limit))

    def _digest(self, key: str, read: Callable[[], Sequence[Any]]) -> tuple[str, int]:
        if key not in self._known:
            try:
                rows = read()
            except ShadowtuneError:
                self._known[key] = (UNREADABLE, 0)
            else:
                hashed = hashlib.sha256()
                for row in rows:
                    hashed.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
                self._known[key] = (hashed.hexdigest()[:16], len(rows))
        return self._known[key]


def read_json(file: Path) -> Any:
    """Read a result file; raises CheckpointError naming it if it is damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> CheckpointError:
    """Return the error for a damaged result file."""
    return CheckpointError(f"{file} is damaged ({' '.join(str(error).split())}); delete it")


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically; the directory is made if it is missing."""
    with writing_into(file.parent) as staging:
        (staging / file.name).write_text(json.dumps(value) + "\n")


def differences(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, nested ones too, that differ from their defaults.

    Names of runs are derived from it, so that they do not change when a later version adds a setting.
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
