"""Benchmark of ``shadowtune plan``: estimated memory and time of a training step over the measured ones.

Two candidates: "estimate" counts on the meta device and multiplies by measured operations, "measured" takes the step.
The ratios of the result rows are estimate over measurement: 1 is exact. The processes of both ask glibc to map large
arrays one by one; with its usual threshold it keeps up to 40 % more than is alive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bases import MODEL_HELP, base_config, check_length
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, option, words
from benchmarks.measurement import ModelCandidate, map_large_arrays
from benchmarks.methods import METHODS, OURS, Method
from benchmarks.training import SteppingCandidate
from shadowtune.model.budget import shapeless_base
from shadowtune.model.cost import BatchShape, training_cost
from shadowtune.model.methods import trainable_parameters
from shadowtune.model.objective import own_causal_objective
from shadowtune.model.speed import MeasuredClock, cpu_seconds

PLANNED = (OURS, "shadow-recommended")
"""Methods that are planned: those of ``shadowtune train``."""


@dataclass(frozen=True)
class PlanSettings(Settings):
    """Settings of ``plan``."""

    models: tuple[str, ...] = option(("tiny", "smollm2-135m"), f"bases, each a case; {MODEL_HELP}", words)
    methods: tuple[str, ...] = option(PLANNED, f"what is trained: any of {', '.join(PLANNED)}", words)
    batch: int = option(4, "sequences of a batch", int)
    length: int = option(256, "tokens of a sequence", int)
    bounds = {**Settings.bounds, "batch": (1, None), "length": (2, None)}

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        check_known(self.methods, PLANNED)


def plan_plan(settings: PlanSettings) -> BenchmarkPlan:
    """One case for each base and method; raises CheckpointError if a base is missing."""
    for model in settings.models:
        check_length(base_config(model), settings.length, model)
    cases = [
        Case(f"{method} on {model}", {"model": model, "method": method})
        for model in settings.models
        for method in settings.methods
    ]
    return BenchmarkPlan({"estimate": {}, "measured": {}}, tuple(cases))


def _method(name: str) -> tuple[Method, int | None]:
    return METHODS[name], None if name == OURS else 32


class EstimateCandidate(ModelCandidate):
    """The estimate of a step."""

    def __init__(self, settings: PlanSettings) -> None:
        super().__init__(settings)
        self.batch = BatchShape(settings.batch, settings.length)

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Count a step; return its peak above the loaded model, MB."""
        method, size = _method(values["method"])
        with torch.device("meta"):
            self.model = method.build(shapeless_base(base_config(values["model"]), dtype=self.dtype), size)
        self.trainable_parameters = trainable_parameters(self.model)
        self.cost = training_cost(self.model, self.batch, own_causal_objective)
        return self.cost.peak / 2**20

    def measure(self) -> float:
        """Measure the operations anew; return the seconds of a step."""
        clock = MeasuredClock()
        return clock.seconds(self.cost.operations) + clock.optimizer_seconds(self.trainable_parameters)


class StepCandidate(SteppingCandidate):
    """The step itself."""

    def __init__(self, settings: PlanSettings) -> None:
        super().__init__(settings)
        self.rows, self.length = settings.batch, settings.length

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Load the model; return the measured peak of a step above it, MB."""
        method, size = _method(values["method"])
        self.load(values["model"], method, size)
        self.start_training()
        self.make_batch(self.rows, self.length, 1.0)
        self._step()  # allocates the optimizer's state
        self.mark_loaded(self.model)
        self._step()
        return self.memory.peak_mb() - self.loaded_mb

    def measure(self) -> float:
        """Seconds of a step, as CPU time on each thread, like those of the estimate."""
        return cpu_seconds(self._step)


def open_plan(settings: PlanSettings, name: str) -> EstimateCandidate | StepCandidate:
    """Open one of the two candidates."""
    map_large_arrays()
    return EstimateCandidate(settings) if name == "estimate" else StepCandidate(settings)


PLAN = Benchmark(
    name="plan",
    help="memory and time of a training step as `shadowtune plan` estimates them, over the measured ones; 1 is exact",
    unit="seconds",
    settings=PlanSettings,
    context=("device", "dtype", "batch", "length"),
    plan=plan_plan,
    open=open_plan,
    examples="""examples:
  python -m benchmarks plan --models tiny --length 64       under a minute
  python -m benchmarks plan --repeats 3
""",
)
