"""``bench scaling``: how a training step's speed and memory change with the tokens of a row, the depth, and the rank.

Each case changes one of the three and leaves the others; in each, all train equally many parameters. The results come
with a picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowtune.benchmark.bases import MODEL_HELP, base_config, check_length
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, integers, option, words
from shadowtune.benchmark.peers import (
    CONTENDERS,
    OURS,
    PEERS,
    check_peers,
    equal_budgets,
    shadow_contender,
)
from shadowtune.benchmark.train import SteppingSubject, check_share
from shadowtune.errors import ConfigError, ShadowtuneError


@dataclass(frozen=True)
class ScalingSettings(Settings):
    """Settings of ``bench scaling``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    peers: tuple[str, ...] = option(("lora",), f"what ours is compared with: any of {', '.join(PEERS)}", words)
    lengths: tuple[int, ...] = option((64, 128, 256, 512), "tokens of a row, each a case", integers)
    depths: tuple[int, ...] = option((8, 15, 30), "first blocks of the base, each a case", integers)
    ranks: tuple[int, ...] = option((4, 16, 64), "ranks of our injection, each a case", integers)
    batch: int = option(4, "rows of a batch", int)
    length: int = option(256, "tokens of a row where they are not what changes", int)
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
        check_share(self.labelled)


def plan(settings: ScalingSettings) -> Plan:
    """Lay out the cases along the three axes, with the sizes of each.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown or not installed, or the base cannot be found, is too
            short or not deep enough, or there are no equal budgets.
    """
    check_peers(settings.peers)
    check_length(base_config(settings.model), max((settings.length, *settings.lengths)), settings.model)
    cases = [
        *(_case(settings, "tokens", length, length=length) for length in settings.lengths),
        *(_case(settings, "depth", depth, model=f"{settings.model}:{depth}") for depth in settings.depths),
        *(_case(settings, "rank", rank, rank=rank) for rank in settings.ranks),
    ]
    if not cases:
        raise ConfigError("nothing to measure: give lengths, depths or ranks")
    return Plan({name: {} for name in (OURS, *settings.peers)}, tuple(cases))


def _case(settings: ScalingSettings, axis: str, value: int, **change: Any) -> Case:
    values = {"model": settings.model, "rank": settings.rank, "length": settings.length, **change}
    contenders = {**CONTENDERS, OURS: shadow_contender(values["rank"])}
    sizes = equal_budgets(base_config(values["model"]), settings.peers, None, contenders)
    step = {"rows": settings.batch, "labelled": settings.labelled}
    return Case(f"{axis}={value}", {**values, **step, "sizes": sizes})


class ScalingSubject(SteppingSubject):
    """A model that is made anew where a case wants another."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings)
        self.name = name
        self.made: tuple[str, int | None, int | None] | None = None

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make model and batch; warm up; return the step's peak MB."""
        size = values["sizes"][self.name]
        wanted = (values["model"], values["rank"] if self.name == OURS else None, size)
        if wanted != self.made:
            contender = shadow_contender(values["rank"]) if self.name == OURS else CONTENDERS[self.name]
            self.load(values["model"], contender, size)
            self.start_training()
            self.made = wanted
        self.make_batch(values["rows"], values["length"], values["labelled"])
        return self.warm()

    def measure(self) -> float:
        """Steps per second."""
        return self.steps_per_second()


def open_subject(settings: ScalingSettings, name: str) -> ScalingSubject:
    """Make a subject of ``bench scaling``; it loads its models case by case."""
    return ScalingSubject(settings, name)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw seconds and MB of a step over each axis, a line for each subject.

    Raises:
        ShadowtuneError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ShadowtuneError("the picture needs matplotlib: pip install 'shadowtune[plot]'") from None
    axes = list(dict.fromkeys(row["case"].split("=")[0] for row in rows))
    figure = Figure(figsize=(4 * len(axes), 6), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        own = [row for row in rows if row["case"].split("=")[0] == axis]
        for prefix, names in (("", {row["subject"] for row in own}), ("peer_", {row["peer"] for row in own})):
            for name in sorted(names):
                chosen = [row for row in own if name == row["peer" if prefix else "subject"]]
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


SCALING = Bench(
    name="scaling",
    help="a training step's time and memory over tokens, depth and rank, with a picture",
    unit="steps_per_second",
    settings=ScalingSettings,
    context=("model", "device", "dtype", "batch", "length", "rank", "labelled", "warm_up"),
    plan=plan,
    open=open_subject,
    draw=draw,
    examples="""examples:
  shadowtune bench scaling --model tiny --lengths 16,32 --depths 2,4 --ranks 4,8     under a minute, a random base
  shadowtune bench scaling --peers lora,peft-shadow --depths 8,15,30
""",
)
