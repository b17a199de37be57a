"""Benchmarks of training: ``train`` (speed of a step), ``memory`` (its peak) and ``scaling`` (both over three axes).

A step is forward, backward, AdamW and zero_grad over one random batch. Ours computes logits at labelled positions only;
each baseline runs its own forward pass with labels, as its users would. The baseline "base" runs the bare base's
forward pass with labels and trains nothing: the cost of the model itself. All others train equally many parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import MODEL_HELP, base_config, check_length
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, integers, numbers, option, words
from benchmarks.measurement import ModelCandidate
from benchmarks.methods import BASELINES, METHODS, OURS, check_baselines, equal_budgets, shadow_method
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.errors import ConfigError
from shadowtune.evaluation.report import new_figure

PHASES = ("train", "prompt")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of ``train``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    baselines: tuple[str, ...] = option(tuple(BASELINES), "what ours is compared with", words)
    labelled: tuple[float, ...] = option(
        (1.0, 0.25, 0.02), "shares of the tokens that have a label, each a case", numbers
    )
    batch: int = option(4, "sequences of a batch", int)
    length: int = option(256, "tokens of a sequence", int)
    parameters: int | None = option(None, "trainable parameters of each; default: those of the default shadow", int)
    bounds = {**Settings.bounds, "batch": (1, None), "length": (2, None), "parameters": (1, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.labelled or not all(0 < share <= 1 for share in self.labelled):
            raise ConfigError(f"labelled must be shares above 0 and up to 1, got {self.labelled}")


@dataclass(frozen=True)
class MemorySettings(Settings):
    """Settings of ``memory``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    baselines: tuple[str, ...] = option(tuple(BASELINES), "what ours is compared with", words)
    phases: tuple[str, ...] = option(PHASES, f"what is measured: any of {', '.join(PHASES)}", words)
    lengths: tuple[int, ...] = option((128, 256, 512), "tokens of a sequence, each a case", integers)
    batch: int = option(4, "sequences of a batch", int)
    labelled: float = option(1.0, "share of the tokens that have a label in training", float)
    parameters: int | None = option(None, "trainable parameters of each; default: those of the default shadow", int)
    bounds = {**Settings.bounds, "batch": (1, None), "parameters": (1, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise ConfigError(f"phases must be some of {', '.join(PHASES)}, got {', '.join(self.phases) or 'none'}")
        _check_share(self.labelled)
        if not self.lengths or min(self.lengths) < 2:
            raise ConfigError(f"lengths must be numbers of at least 2, got {self.lengths}")


@dataclass(frozen=True)
class ScalingSettings(Settings):
    """Settings of ``scaling``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    baselines: tuple[str, ...] = option(("lora",), f"what ours is compared with: any of {', '.join(BASELINES)}", words)
    lengths: tuple[int, ...] = option((64, 128, 256, 512), "tokens of a sequence, each a case", integers)
    depths: tuple[int, ...] = option((8, 15, 30), "first blocks of the base, each a case", integers)
    ranks: tuple[int, ...] = option((4, 16, 64), "ranks of our injection, each a case", integers)
    batch: int = option(4, "sequences of a batch", int)
    length: int = option(256, "tokens of a sequence where it is not what changes", int)
    rank: int = option(16, "rank where it is not what changes", int)
    labelled: float = option(1.0, "share of the tokens that have a label", float)
    bounds = {**Settings.bounds, "batch": (1, None), "length": (2, None), "rank": (1, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name, least in (("lengths", 2), ("depths", 2), ("ranks", 1)):
            values = vars(self)[name]
            if values and min(values) < least:
                raise ConfigError(f"{name} must be numbers of at least {least}, got {values}")
        _check_share(self.labelled)


def _check_share(labelled: float) -> None:
    if not 0 < labelled <= 1:
        raise ConfigError(f"labelled must be a share above 0 and up to 1, got {labelled}")


def plan_train(settings: TrainSettings) -> BenchmarkPlan:
    """Choose sizes that make the budgets equal; one case for each share of labelled tokens.

    Raises:
        ShadowtuneError: if a baseline is unknown or not installed, the base is missing or too short, or there are no
            equal budgets.
    """
    candidates = _equal_candidates(settings, settings.length)
    shape = {"rows": settings.batch, "length": settings.length}
    cases = (Case(f"labelled={share:g}", {**shape, "labelled": share}) for share in settings.labelled)
    return BenchmarkPlan(candidates, tuple(cases))


def plan_memory(settings: MemorySettings) -> BenchmarkPlan:
    """Choose sizes that make the budgets equal; one case for each phase and length. Raises as ``plan_train``."""
    candidates = _equal_candidates(settings, max(settings.lengths))
    cases = tuple(
        Case(
            f"{phase}, {settings.batch} x {length} tokens",
            {"phase": phase, "rows": settings.batch, "length": length, "labelled": settings.labelled},
        )
        for phase in settings.phases
        for length in settings.lengths
    )
    return BenchmarkPlan(candidates, cases)


def _equal_candidates(settings: TrainSettings | MemorySettings, longest: int) -> dict[str, dict[str, int | None]]:
    check_baselines(settings.baselines, device=settings.device)
    config = base_config(settings.model)
    check_length(config, longest, settings.model)
    sizes = equal_budgets(config, settings.baselines, settings.parameters)
    return {name: {"size": size} for name, size in sizes.items()}


def plan_scaling(settings: ScalingSettings) -> BenchmarkPlan:
    """Lay out the cases along the three axes, with the sizes of each. Raises as ``plan_train``."""
    check_baselines(settings.baselines, device=settings.device)
    check_length(base_config(settings.model), max((settings.length, *settings.lengths)), settings.model)
    cases = [
        *(_scaling_case(settings, "tokens", length, length=length) for length in settings.lengths),
        *(_scaling_case(settings, "depth", depth, model=f"{settings.model}:{depth}") for depth in settings.depths),
        *(_scaling_case(settings, "rank", rank, rank=rank) for rank in settings.ranks),
    ]
    if not cases:
        raise ConfigError("nothing to measure: give lengths, depths or ranks")
    return BenchmarkPlan({name: {} for name in (OURS, *settings.baselines)}, tuple(cases))


def _scaling_case(settings: ScalingSettings, axis: str, value: int, **change: Any) -> Case:
    values = {"model": settings.model, "rank": settings.rank, "length": settings.length, **change}
    methods = {**METHODS, OURS: shadow_method(values["rank"])}
    sizes = equal_budgets(base_config(values["model"]), settings.baselines, None, methods)
    step = {"rows": settings.batch, "labelled": settings.labelled}
    return Case(f"{axis}={value}", {**values, **step, "sizes": sizes})


class SteppingCandidate(ModelCandidate):
    """A model and its optimizer, stepping over one random batch; a subclass loads them."""

    optimizer: torch.optim.Optimizer | None
    batch: dict[str, torch.Tensor]

    def start_training(self) -> None:
        """Set the training mode, and create AdamW for the trainable parameters."""
        self.model.train(self.trainable_parameters > 0)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.mark_loaded(self.model)

    def make_batch(self, rows: int, length: int, labelled: float) -> None:
        """Draw a batch (rows, length); the last share ``labelled`` of each sequence has labels, as a completion has."""
        ids = torch.randint(self.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : -max(1, round(labelled * length))] = IGNORE_INDEX
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _step(self) -> None:
        if self.optimizer is None:
            with torch.no_grad():
                self.model(**self.batch, use_cache=False)
            return
        self.model(**self.batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class TrainCandidate(SteppingCandidate):
    """One model for all cases; a sample is tokens per second."""

    def __init__(self, settings: TrainSettings | MemorySettings, name: str, size: int | None) -> None:
        super().__init__(settings)
        self.load(settings.model, METHODS[name], size)
        self.start_training()

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make the batch and warm up; return the step's peak MB."""
        self.make_batch(**values)
        return self.warm()

    def measure(self) -> float:
        """Tokens per second, those without a label included."""
        return self.batch["input_ids"].numel() * self.steps_per_second()


class MemoryCandidate(TrainCandidate):
    """A model that trains, or reads prompts and keeps their cache; a sample is the peak MB of one step."""

    phase = PHASES[0]

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make the batch and take a first step, which allocates the state of the optimizer."""
        self.phase = values["phase"]
        self.make_batch(values["rows"], values["length"], values["labelled"])
        self.model.train(self.phase == "train" and self.optimizer is not None)
        self._step()
        self.mark_loaded(self.model)
        return self.measure()

    def measure(self) -> float:
        """Peak of one step, MB; above 0, since it is a divisor."""
        self.memory.restart()
        self._step()
        peak = self.memory.peak_mb() - self.loaded_mb
        self.memory.release()
        return max(peak, 1e-3)

    def _step(self) -> None:
        if self.phase == "train":
            super()._step()
            return
        prompt = {name: tensor for name, tensor in self.batch.items() if name != "labels"}
        with torch.no_grad():
            self.model(**prompt, use_cache=True, logits_to_keep=1)


class ScalingCandidate(SteppingCandidate):
    """A model that is made anew where a case needs another; a sample is steps per second."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings)
        self.name = name
        self.made: tuple[str, int | None, int | None] | None = None

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make model and batch, and warm up; return the step's peak MB."""
        size = values["sizes"][self.name]
        wanted = (values["model"], values["rank"] if self.name == OURS else None, size)
        if wanted != self.made:
            method = shadow_method(values["rank"]) if self.name == OURS else METHODS[self.name]
            self.load(values["model"], method, size)
            self.start_training()
            self.made = wanted
        self.make_batch(values["rows"], values["length"], values["labelled"])
        return self.warm()

    def measure(self) -> float:
        """Steps per second."""
        return self.steps_per_second()


def draw_scaling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw seconds and MB of a step over each axis, a line for each candidate.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    axes = list(dict.fromkeys(row["case"].split("=")[0] for row in rows))
    figure = new_figure(4 * len(axes), 6)
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        own = [row for row in rows if row["case"].split("=")[0] == axis]
        for prefix, names in (("", {row["candidate"] for row in own}), ("baseline_", {row["baseline"] for row in own})):
            for name in sorted(names):
                chosen = [row for row in own if name == row["baseline" if prefix else "candidate"]]
                points = {int(row["case"].split("=")[1]): row for row in chosen}
                seconds = [1 / row[f"{prefix}steps_per_second"] for row in points.values()]
                memory = [row[f"{prefix}peak_memory_mb"] for row in points.values()]
                for line, values in zip(grid[:, column], (seconds, memory), strict=True):
                    line.plot(list(points), values, marker="o", label=name)
        for line, label in zip(grid[:, column], ("seconds a step", "MB above the model"), strict=True):
            line.set(xlabel=axis, ylabel=label, ylim=(0, None))
            line.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.savefig(path, dpi=120)


TRAIN = Benchmark(
    name="train",
    help="a full training step: tokens per second and peak memory",
    unit="tokens_per_second",
    settings=TrainSettings,
    context=("model", "device", "dtype", "batch", "length", "warm_up"),
    plan=plan_train,
    open=TrainCandidate,
    examples="""examples:
  python -m benchmarks train --model tiny            under a minute: a random base, to see how it works
  python -m benchmarks train --baselines lora,peft-shadow --labelled 0.02 --json result.json
  python -m benchmarks train --model path/or/hub-id --device cuda --dtype bfloat16
  python -m benchmarks train --model llama-3.2-3b-random --batch 4 --length 768 --labelled 1.0 --baselines lora-liger \\
      --device cuda --dtype bfloat16   the shape of PEFT's own benchmark, with random weights
  python -m benchmarks train --model smollm2-135m:10 --baselines lora   its first 10 blocks: how costs grow with depth
""",
)
MEMORY = Benchmark(
    name="memory",
    help="peak memory of a training step and of reading a prompt, above the loaded model; ratios below 1 are good",
    unit="mb",
    settings=MemorySettings,
    context=("model", "device", "dtype", "batch", "labelled"),
    plan=plan_memory,
    open=MemoryCandidate,
    examples="""examples:
  python -m benchmarks memory --model tiny --lengths 32,64       under a minute: a random base, to see how it works
  python -m benchmarks memory --phases train --lengths 256,1024 --batch 1 --baselines lora,peft-shadow
""",
)
SCALING = Benchmark(
    name="scaling",
    help="a training step's time and memory over tokens, depth and rank, with a figure",
    unit="steps_per_second",
    settings=ScalingSettings,
    context=("model", "device", "dtype", "batch", "length", "rank", "labelled", "warm_up"),
    plan=plan_scaling,
    open=ScalingCandidate,
    draw=draw_scaling,
    examples="""examples:
  python -m benchmarks scaling --model tiny --lengths 16,32 --depths 2,4 --ranks 4,8     under a minute, a random base
  python -m benchmarks scaling --baselines lora,peft-shadow --depths 8,15,30
""",
)
