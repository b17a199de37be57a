"""The settings of a comparison: methods x tasks x seeds, as written in a YAML file for ``shadowtune compare``."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shadowtune.config.baselines import BASELINES, default_rates
from shadowtune.config.checking import check_range, from_mapping, nearest
from shadowtune.config.merging import merge, put, unknown_keys
from shadowtune.config.sweep import SweepConfig
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError

KINDS = ("shadow", "lora", "dora", "full", "peft", "ensemble", "base")
"""What a method can be; "base" is the model as it is, which nothing trains."""
BASE_KEYS = ("model", "revision", "data", "task", "num_labels", "attention", "base_dtype", "base_quantization")
"""Settings that matter where nothing is trained."""
RESERVED = {"output": "output", "seed": "seeds"}
"""Settings of a single run that the comparison decides, and by which setting of its own."""


@dataclass(frozen=True)
class BudgetConfig:
    """What is made equal for every method: trainable parameters and steps, wall time, peak memory; each by itself."""

    parameters: int | None = None
    """Trainable parameters to aim at, by one size of each method that is chosen automatically."""
    like: str | None = None
    """A method whose own size is aimed at, in place of ``parameters``."""
    tolerance: float = 0.03
    """Largest difference of parameters between two methods, relative to the first one."""
    time: str | None = None
    """A method whose whole training time every other one gets, in runs of their own: passes and steps of all stages are
    scaled by one factor, from the seconds that both took for the same steps, on the first seed."""
    memory: str | None = None
    """A method whose peak memory of training every other one gets, in runs of their own: its size is chosen from the
    memory measured on the first seed."""
    measured_tolerance: float = 0.1
    """Largest difference of time or memory, as it was measured, relative to that method's."""

    def __post_init__(self) -> None:
        """Check the ranges, and that there is one aim."""
        check_range(self, parameters=(1, None), tolerance=(0, 1), measured_tolerance=(0, 1))
        if self.parameters is not None and self.like is not None:
            raise ConfigError("set either parameters or like (a method's name)")
        if self.parameters is None and self.like is None and self.time is None and self.memory is None:
            raise ConfigError("set either parameters or like (a method's name), or time, or memory")

    @property
    def equal_parameters(self) -> bool:
        """Whether sizes are chosen so that all train equally many parameters."""
        return self.parameters is not None or self.like is not None


@dataclass(frozen=True)
class ForgettingConfig:
    """Text that no task is about, on which each model's perplexity is measured before and after training."""

    text: str
    """Rows with a field ``text``: a data set as in ``DataConfig.train``, such as a .txt file or a directory, or the
    name of a folder in the comparison's ``directory``."""
    split: str = "test"
    """Split of a data set that has splits."""
    limit: int = 64
    """Use only so many blocks of ``length`` tokens, the first ones."""
    length: int = 256
    """Tokens of a block."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, limit=(1, None), length=(2, None))


@dataclass(frozen=True)
class TaskOptions:
    """Keys of a task beside the training settings."""

    test: str | None = None
    """Held-out rows as in ``data.train``; None means the test rows of the task or data set."""
    test_split: str = "test"
    """Split of a data set that has splits."""
    test_limit: int | None = None
    """Use only so many test rows."""
    validation_limit: int | None = None
    """Use only so many validation rows in the sweep."""
    test_tasks: list[str] | None = None
    """Tasks whose test rows the trained model answers; None means its own."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, test_limit=(1, None), validation_limit=(1, None))


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods.

    A run's settings are ``common``, then the task's, then the method's; the last one wins.

    Raises:
        ConfigError: naming every unknown key and contradiction at once.
    """

    tasks: dict[str, Any]
    """Name of a task -> training settings (``data.task`` is its name unless it has rows of its own), and the keys of
    ``TaskOptions``."""
    methods: dict[str, Any]
    """Name of a method -> training settings, such as ``method`` (by default its name, if it is one of shadow, lora,
    dora, full, peft, ensemble, base or a key of ``BASELINES``), and ``size``, the dotted key that the budget chooses
    ("none" leaves the method alone)."""
    only: list[str] | None = None
    """Names of the tasks to train on and of the methods to do it with; without names of one kind, all of that kind."""
    output: str = "runs/compare"
    """Directory of everything it makes."""
    common: dict[str, Any] = field(default_factory=dict)
    """Training settings of all runs."""
    directory: str | None = None
    """A directory of local data for the tasks, a folder each; None gets them from the Hub."""
    budget: BudgetConfig | None = None
    """What is made equal; null leaves each method its own size, and gives all the same passes."""
    forgetting: ForgettingConfig | None = None
    """Text to measure forgetting on; null measures none."""
    validation_rows: Literal["as_given", "all"] = "as_given"
    """Where one method chooses something by validation rows in training: "all" lets every other one learn these rows,
    so that all have the same data; "as_given" leaves each its settings, and the report counts the rows."""
    sweep: SweepConfig | None = None
    """A search for settings before the runs; null trains with those that are given."""
    seeds: list[int] = field(default_factory=lambda: [42])
    """Each method is trained once with each; the sweep uses the first."""
    reference: str | None = None
    """The method that is compared with each other one; None means the first shadow, else the first."""
    test_batch_size: int = 32
    """Rows answered at a time."""
    jobs: int = 1
    """Runs at the same time."""
    devices: list[int] | None = None
    """Numbers of the CUDA devices to spread them over; None uses the first, or the processor."""

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model or data."""
        check_range(self, jobs=(1, None), test_batch_size=(1, None))
        faults = self._shape_faults()
        if not faults:
            faults = self._key_faults() + self._reference_faults()
        if not faults:
            faults = self._run_faults()
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def chosen_tasks(self) -> list[str]:
        """The tasks to train on."""
        return self._chosen(self.tasks)

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to train."""
        return self._chosen(self.methods)

    def task_options(self, task: str) -> TaskOptions:
        """Return the options of a task."""
        return from_mapping(TaskOptions, _split(self.tasks[task])[0], f"tasks.{task}")

    @property
    def tuning_tasks(self) -> list[str]:
        """The tasks whose validation rows the sweep reads; without a sweep, none."""
        if self.sweep is None:
            return []
        return self.chosen_tasks if self.sweep.tasks is None else self.sweep.tasks

    @property
    def trained_methods(self) -> list[str]:
        """The methods to train, the base left out."""
        return [method for method in self.chosen_methods if self.kind(method) != "base"]

    def baseline(self, method: str) -> str:
        """Return the word that says what a method is: its ``method``, by default its name."""
        return str((self.methods[method] or {}).get("method", method))

    def settings_of(self, method: str) -> dict[str, Any]:
        """Return the settings of a method, those of the baseline that it names included."""
        own = {key: value for key, value in (self.methods[method] or {}).items() if key != "method"}
        return merge({"method": self.baseline(method)}, BASELINES.get(self.baseline(method), {}), own)

    def kind(self, method: str) -> str:
        """Return what a method is: one of ``KINDS``, or the unknown word that was given for it."""
        return str(self.settings_of(method)["method"])

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return the settings of each trial of a method's grid by dotted keys; none without a sweep."""
        return [] if self.sweep is None else self.sweep.trials(method, default_rates(self.baseline(method)))

    def size_key(self, method: str) -> str | None:
        """Return the dotted key that the budget chooses for a method; None leaves it alone."""
        default = {"shadow": "shadow.intermediate_size", "lora": "lora.rank", "dora": "lora.rank", "peft": "peft.r"}
        default["ensemble"] = "lora.rank"
        settings = self.settings_of(method)
        if (settings.get("peft") or {}).get("peft_type") == "SHADOW":
            default["peft"] = "peft.shadow_intermediate_size"
        key = settings.get("size", default.get(self.kind(method)))
        return None if key == "none" else key

    def best_of(self) -> str:
        """Return the name of the method that is compared with the others."""
        shadows = [method for method in self.methods if self.kind(method) == "shadow"]
        return self.reference or next(iter([*shadows, *self.methods]))

    def train_config(self, task: str, method: str, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """Return the settings of a single run; raises ConfigError if they contradict each other.

        Args:
            task: name of a task.
            method: name of a method; of "base", only what matters without training is taken.
            changes: values by dotted keys that replace all others.
        """
        own = {key: value for key, value in self.settings_of(method).items() if key != "size"}
        values = merge(self.common, _split(self.tasks[task])[1], own)
        data = values.setdefault("data", {})
        if data.get("train") is None and data.get("task") is None:
            data["task"] = task
        if data.get("task") is not None and self.directory is not None:
            data.setdefault("directory", self.directory)
        if self.kind(method) == "ensemble" and data.get("task") is not None:
            data.setdefault("validation", "task")
        if self.kind(method) == "base":
            values = {key: value for key, value in values.items() if key in BASE_KEYS}
        for key, value in (changes or {}).items():
            put(values, key, value)
        return from_mapping(TrainConfig, values, where="")

    def _chosen(self, names: Iterable[str]) -> list[str]:
        """Those that ``only`` names; all if it names none of them."""
        known = list(names)
        return [name for name in known if name in (self.only or ())] or known

    def _shape_faults(self) -> list[str]:
        """What is no mapping, no list, empty, or cannot be the name of a directory."""
        faults = [f"{name} must not be empty" for name in ("tasks", "methods", "seeds") if not vars(self)[name]]
        places = {"tasks": self.tasks, "methods": self.methods}
        for place, mapping in places.items():
            for name, value in mapping.items():
                if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
                    faults.append(f"{place}: {name!r} cannot name a directory; use letters, digits, - and _")
                if not (value is None or isinstance(value, Mapping)):
                    faults.append(f"{place}.{name} must be a mapping of settings, got {value!r}")
        return faults

    def _key_faults(self) -> list[str]:
        """Keys that no training settings have, and those that the comparison decides."""
        sweep = self.sweep or SweepConfig()
        parts = {"common": self.common, "sweep.settings": sweep.settings}
        parts |= {f"tasks.{name}": _split(value)[1] for name, value in self.tasks.items()}
        for name, value in self.methods.items():
            parts[f"methods.{name}"] = {key: part for key, part in (value or {}).items() if key != "size"}
        for place, grid in sweep.grids().items():
            parts[f"sweep.{place}"] = {}
            for key in grid:
                put(parts[f"sweep.{place}"], key, None)
        faults = [fault for place, values in parts.items() for fault in unknown_keys(TrainConfig, values, place)]
        for place, values in parts.items():
            faults += [f"{place}.{key} is decided by {by}" for key, by in RESERVED.items() if key in values]
        return faults

    def _reference_faults(self) -> list[str]:
        """Names of methods and tasks that do not exist, and trials that are not equally many."""
        sweep, named = self.sweep or SweepConfig(), [("reference", self.reference, self.methods)]
        for key in ("like", "time", "memory"):
            named.append((f"budget.{key}", None if self.budget is None else vars(self.budget)[key], self.methods))
        named += [("sweep.tasks", task, self.tasks) for task in sweep.tasks or []]
        named += [("only", name, {**self.tasks, **self.methods}) for name in self.only or []]
        named += [("sweep.methods", method, self.methods) for method in sweep.methods]
        for task in self.tasks:
            tested = self.task_options(task).test_tasks or []
            named += [(f"tasks.{task}.test_tasks", other, self.tasks) for other in tested]
        faults = [
            f"{place}: there is no {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            for place, name, known in named
            if name is not None and name not in known
        ]
        words = (*KINDS, *BASELINES)
        for method in self.methods:
            if self.kind(method) not in KINDS:
                word = self.kind(method)
                faults.append(
                    f"methods.{method}.method must be one of {', '.join(words)}, got {word!r}{nearest(word, words)}"
                )
        for key in ("time", "memory"):
            name = None if self.budget is None else vars(self.budget)[key]
            if name in self.methods and self.kind(name) == "base":
                faults.append(f"budget.{key}: {name} is not trained; name another method")
        counts = {method: len(self.trials(method)) for method in self.methods if self.kind(method) != "base"}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{method} {count}" for method, count in counts.items())
            faults.append(f"sweep: every method must have as many trials, but there are {said}")
        both = sorted(set(self.only or ()) & set(self.tasks) & set(self.methods))
        faults += [f"only: {name} is both a task and a method; rename one of them" for name in both]
        return faults

    def _run_faults(self) -> list[str]:
        """What the settings of single runs contradict each other in, each fault once."""
        found: dict[str, str] = {}
        sweep = self.sweep or SweepConfig()
        for task, method in itertools.product(self.tasks, self.methods):
            for changes in [{}, *({**sweep.settings, **trial} for trial in self.trials(method))]:
                try:
                    data = self.train_config(task, method, changes).data
                except ConfigError as error:
                    found.setdefault(str(error), f"task {task}, method {method}")
                    continue
                tuned = self.sweep is not None and task in (self.sweep.tasks or self.tasks)
                if tuned and data.task is None and data.validation is None:
                    found.setdefault("sweep needs validation rows: set data.validation", f"task {task}")
        return [f"{place}: {fault}" for fault, place in found.items()]


def _split(entry: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a task's entry into its options and its training settings."""
    names = {option.name for option in fields(TaskOptions)}
    values = entry or {}
    return {k: v for k, v in values.items() if k in names}, {k: v for k, v in values.items() if k not in names}
