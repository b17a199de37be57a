"""Settings of a comparison (``shadowtune compare``): methods x tasks x seeds, with equal budgets."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import StrictInt

from shadowtune.config.cluster import ClusterConfig
from shadowtune.config.loading import put
from shadowtune.config.settings import (
    Fraction,
    PositiveInt,
    from_mapping,
    nearest,
    raise_errors,
    settings,
    unknown_keys,
)
from shadowtune.config.sweep import SweepConfig, default_rates
from shadowtune.config.training import TrainConfig, merge
from shadowtune.errors import ConfigError

KINDS = ("shadow", "lora", "dora", "full", "peft", "ensemble", "base")
"""Kinds of methods; "base" is the model as it is, without training."""
BASE_KEYS = ("model", "revision", "data", "task", "num_labels", "attention", "base_dtype", "base_quantization")
"""Training settings that matter for "base"."""
RESERVED = {"output": "output", "seed": "seeds"}
"""Training settings that the comparison sets -> its own setting for them."""
SIZE_KEYS = {
    "shadow": "shadow.intermediate_size",
    "lora": "lora.rank",
    "dora": "lora.rank",
    "peft": "peft.r",
    "ensemble": "lora.rank",
}
"""Kind -> the dotted key by which the budget sets its number of parameters, by default."""

_ALL_LINEAR = {"target_modules": "all-linear"}
_LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **_ALL_LINEAR}

BASELINES: dict[str, dict[str, Any]] = {
    # alpha = 2 r: the method "lora" with the defaults of LoraConfig; the budget keeps the ratio.
    "lora-alpha-32": {"method": "peft", "peft": _LORA},
    # Kalajdzievski, 2023 (arXiv 2312.03732): scale alpha / sqrt(r).
    "rslora": {"method": "peft", "peft": {**_LORA, "lora_alpha": 16, "use_rslora": True}},
    # Hayou et al., 2024 (arXiv 2402.12354): B learns 16 times as fast as A.
    "lora-plus": {"method": "lora", "optimizer": {"lora_plus_ratio": 16.0}},
    # Kang and Yin, 2024 (arXiv 2409.15371).
    "miss": {"method": "peft", "peft": {"peft_type": "MISS", "r": 16, **_ALL_LINEAR}},
    # Lily: A shared by two neighbouring layers, B by all through a router; the most accurate method of PEFT's own
    # benchmark (MetaMathQA, 0.19), with its settings for all linear layers there.
    "lily": {"method": "peft", "peft": {"peft_type": "LILY", "r": 32, "stride_A": 2, "num_B": 2, "scaling": 4.0}},
    # The Shadow tuner of PEFT, with its own defaults and the paper's rank; it does not support packed documents.
    "peft-shadow": {
        "method": "peft",
        "padding_free": False,
        "peft": {"peft_type": "SHADOW", "r": 16, "update_hidden_size": 8},
    },
    # LoRA plus the logits of a small model trained on the task by itself, with a weight fitted afterwards.
    "lora-ensemble": {"method": "ensemble", "shadow_epochs": 4.0, "shadow": {"init_layers": [0]}},
}
"""Training settings of baselines, by the names that their users know.

A method of a comparison with one of these names, or with one as its ``method``, starts from these settings; its own
override them. Every baseline adapts all linear layers, with the defaults of its paper or of Hugging Face PEFT.
"""


@settings
class BudgetConfig:
    """What is made equal for every method: trainable parameters and steps, wall time, peak memory; each by itself."""

    parameters: PositiveInt | None = None
    """Trainable parameters to approximate, by one size of each method that is chosen automatically."""
    like: str | None = None
    """A method whose own number of parameters is approximated, in place of ``parameters``."""
    tolerance: Fraction = 0.03
    """Largest difference of parameters between two methods, relative to the first one."""
    time: str | None = None
    """A method whose whole training time every other one gets, in additional runs: epochs and steps of all stages are
    scaled by one factor, from the seconds that both took for the same steps, on the first seed."""
    memory: str | None = None
    """A method whose peak training memory every other one gets, in additional runs: its size is chosen by the memory
    measured on the first seed."""
    measured_tolerance: Fraction = 0.1
    """Largest measured difference of time or memory, relative to that method's."""

    def __post_init__(self) -> None:
        """Check that there is one aim."""
        both = self.parameters is not None and self.like is not None
        if both or not (self.equal_parameters or self.time is not None or self.memory is not None):
            alternatives = "" if both else ", or time, or memory"
            raise ConfigError(f"set either parameters or like (a method's name){alternatives}")

    @property
    def equal_parameters(self) -> bool:
        """Whether sizes are chosen such that all methods train equally many parameters."""
        return self.parameters is not None or self.like is not None


@settings
class ForgettingConfig:
    """A text unrelated to the tasks, on which each model's perplexity is measured before and after training."""

    text: str
    """Data set with a field ``text``, as in ``DataConfig.train``, such as a .txt file or a directory, or the name of a
    folder in the comparison's ``directory``."""
    split: str = "test"
    """Split of a data set that has splits."""
    limit: PositiveInt = 64
    """Most blocks of ``length`` tokens, the first ones."""
    length: Annotated[StrictInt, Ge(2)] = 256
    """Tokens of a block."""


@settings
class TaskOptions:
    """Keys of a task in a comparison beside the training settings."""

    test: str | None = None
    """Test examples, as in ``data.train``; None means those of the task or data set."""
    test_split: str = "test"
    """Split of a data set that has splits."""
    test_limit: PositiveInt | None = None
    """Most test examples."""
    validation_limit: PositiveInt | None = None
    """Most validation examples in the sweep."""
    test_tasks: list[str] | None = None
    """Tasks whose test examples the trained model is evaluated on; None means its own."""


@settings
class CompareConfig:
    """A comparison of methods.

    The settings of a run are ``common``, overridden by the task's, overridden by the method's.

    Raises:
        ConfigError: with all unknown keys and contradictions.
    """

    tasks: dict[str, Any]
    """Name of a task -> training settings (``data.task`` is its name unless it has data of its own), and the keys of
    ``TaskOptions``."""
    methods: dict[str, Any]
    """Name of a method -> training settings, such as ``method`` (by default its name, if that is one of shadow, lora,
    dora, full, peft, ensemble, base or a key of ``BASELINES``), and ``size``, the dotted key that the budget sets
    ("none" sets none)."""
    only: list[str] | None = None
    """Names of the tasks and methods to run; without a task all tasks, without a method all methods."""
    output: str = "runs/compare"
    """Directory of all its files."""
    common: dict[str, Any] = field(default_factory=dict)
    """Training settings of all runs."""
    directory: str | None = None
    """Directory of local data for the tasks, with a folder for each; None loads them from the Hub."""
    budget: BudgetConfig | None = None
    """What is made equal; null keeps each method's own size and trains all for the same epochs."""
    forgetting: ForgettingConfig | None = None
    """Text to measure forgetting on; null measures none."""
    validation_rows: Literal["as_given", "all"] = "as_given"
    """Where one method selects something by validation examples in training: "all" lets every other one train on them,
    so that all have the same data; "as_given" changes nothing, and the report counts the examples."""
    sweep: SweepConfig | None = None
    """A search for settings before the runs; null trains with the given ones."""
    seeds: list[StrictInt] = field(default_factory=lambda: [42])
    """Each method is trained once with each seed; the sweep uses the first."""
    reference: str | None = None
    """The method that is compared with each other one; None means the first shadow, else the first."""
    test_batch_size: PositiveInt = 32
    """Test examples per batch."""
    jobs: PositiveInt = 1
    """Runs at the same time; with a cluster, runs that are queued or running there."""
    devices: list[StrictInt] | None = None
    """Indices of the CUDA devices to use; None uses the first, or the CPU."""
    cluster: ClusterConfig | None = None
    """A cluster that executes the runs; null runs them on this machine."""

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model or data."""
        raise_errors(self._shape_errors())
        raise_errors([*self._key_errors(), *self._name_errors()])
        raise_errors(self._run_errors())

    @property
    def chosen_tasks(self) -> list[str]:
        """The tasks to train on."""
        return self._chosen(self.tasks)

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to run."""
        return self._chosen(self.methods)

    @property
    def trained_methods(self) -> list[str]:
        """The methods to train, without the base."""
        return [method for method in self.chosen_methods if self.kind(method) != "base"]

    @property
    def tuning_tasks(self) -> list[str]:
        """The tasks whose validation examples the sweep uses; without a sweep, none."""
        if self.sweep is None:
            return []
        return self.chosen_tasks if self.sweep.tasks is None else self.sweep.tasks

    def task_options(self, task: str) -> TaskOptions:
        """Return the options of a task."""
        return from_mapping(TaskOptions, _split(self.tasks[task])[0], f"tasks.{task}")

    def baseline(self, method: str) -> str:
        """Return the ``method`` of a method, by default its name: a kind, or a key of ``BASELINES``."""
        return str((self.methods[method] or {}).get("method", method))

    def settings_of(self, method: str) -> dict[str, Any]:
        """Return the settings of a method, those of its baseline included."""
        own = {key: value for key, value in (self.methods[method] or {}).items() if key != "method"}
        return merge({"method": self.baseline(method)}, BASELINES.get(self.baseline(method), {}), own)

    def kind(self, method: str) -> str:
        """Return the kind of a method: one of ``KINDS``, or an unknown word that was given for it."""
        return str(self.settings_of(method)["method"])

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return the settings of each trial of a method's grid by dotted keys; none without a sweep."""
        return [] if self.sweep is None else self.sweep.trials(method, default_rates(self.baseline(method)))

    def size_key(self, method: str) -> str | None:
        """Return the dotted key that the budget sets for a method; None sets none."""
        settings, kind = self.settings_of(method), self.kind(method)
        is_shadow_tuner = kind == "peft" and (settings.get("peft") or {}).get("peft_type") == "SHADOW"
        default = "peft.shadow_intermediate_size" if is_shadow_tuner else SIZE_KEYS.get(kind)
        key = settings.get("size", default)
        return None if key == "none" else key

    def best_of(self) -> str:
        """Return the name of the method that is compared with the others."""
        shadows = [method for method in self.methods if self.kind(method) == "shadow"]
        return self.reference or next(iter([*shadows, *self.methods]))

    def train_config(self, task: str, method: str, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """Return the settings of a single run.

        Args:
            task: name of a task.
            method: name of a method; of "base", only what matters without training is used.
            changes: values by dotted keys that override all others.

        Raises:
            ConfigError: if they contradict each other.
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
        return from_mapping(TrainConfig, values)

    def _chosen(self, names: Iterable[str]) -> list[str]:
        """Return the names in ``only``; all if none is."""
        known = list(names)
        return [name for name in known if name in (self.only or ())] or known

    def _shape_errors(self) -> Iterator[str]:
        """Check for empty and misshapen values, and for names that cannot be directories."""
        yield from (f"{name} must not be empty" for name in ("tasks", "methods", "seeds") if not vars(self)[name])
        if self.cluster is not None and self.devices is not None:
            yield f"devices={self.devices} are of this machine, and cluster chooses its own; leave devices out"
        for key, mapping in (("tasks", self.tasks), ("methods", self.methods)):
            for name, value in mapping.items():
                if not re.fullmatch(r"\w[\w.+-]*", name):
                    yield f"{key}: {name!r} cannot name a directory; use letters, digits, - and _"
                if not (value is None or isinstance(value, Mapping)):
                    yield f"{key}.{name} must be a mapping of settings, got {value!r}"

    def _key_errors(self) -> Iterator[str]:
        """Check for keys that are no training settings, or that the comparison sets itself."""
        sweep = self.sweep or SweepConfig()
        parts = {"common": self.common, "sweep.settings": sweep.settings}
        parts |= {f"tasks.{name}": _split(value)[1] for name, value in self.tasks.items()}
        for name, value in self.methods.items():
            parts[f"methods.{name}"] = {key: part for key, part in (value or {}).items() if key != "size"}
        for where, grid in sweep.grids().items():
            parts[f"sweep.{where}"] = {}
            for key in grid:
                put(parts[f"sweep.{where}"], key, None)
        for where, values in parts.items():
            yield from unknown_keys(TrainConfig, values, where)
        for where, values in parts.items():
            yield from (f"{where}.{key} is decided by {by}" for key, by in RESERVED.items() if key in values)

    def _name_errors(self) -> Iterator[str]:
        """Check for names of methods and tasks that do not exist, and for unequal numbers of trials."""
        yield from (
            f"{where}: there is no {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            for where, name, known in self._references()
            if name is not None and name not in known
        )
        words = (*KINDS, *BASELINES)
        for method in self.methods:
            if (word := self.kind(method)) not in KINDS:
                yield f"methods.{method}.method must be one of {', '.join(words)}, got {word!r}{nearest(word, words)}"
        for key in ("time", "memory"):
            name = None if self.budget is None else vars(self.budget)[key]
            if name in self.methods and self.kind(name) == "base":
                yield f"budget.{key}: {name} is not trained; name another method"
        counts = {method: len(self.trials(method)) for method in self.methods if self.kind(method) != "base"}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{method} {count}" for method, count in counts.items())
            yield f"sweep: every method must have as many trials, but there are {listed}"
        for name in sorted(set(self.only or ()) & set(self.tasks) & set(self.methods)):
            yield f"only: {name} is both a task and a method; rename one of them"

    def _references(self) -> Iterator[tuple[str, str | None, Iterable[str]]]:
        """Return each setting that names a method or a task, the name, and the known ones."""
        sweep = self.sweep or SweepConfig()
        yield "reference", self.reference, self.methods
        for key in ("like", "time", "memory"):
            yield f"budget.{key}", None if self.budget is None else vars(self.budget)[key], self.methods
        yield from (("sweep.tasks", task, self.tasks) for task in sweep.tasks or [])
        yield from (("only", name, {**self.tasks, **self.methods}) for name in self.only or [])
        yield from (("sweep.methods", method, self.methods) for method in sweep.methods)
        for task in self.tasks:
            tested = self.task_options(task).test_tasks or []
            yield from ((f"tasks.{task}.test_tasks", other, self.tasks) for other in tested)

    def _run_errors(self) -> Iterator[str]:
        """Check the settings of all single runs; an error of several runs is reported once."""
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
        yield from (f"{run}: {error}" for error, run in found.items())


def _split(entry: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a task's entry into its options and its training settings."""
    names = {option.name for option in fields(TaskOptions)}
    values = entry or {}
    return {k: v for k, v in values.items() if k in names}, {k: v for k, v in values.items() if k not in names}
