r"""``bench boundary``: one crossing of a boundary, forward and forward with backward, in operations per second.

The peer "reference" is the same module, computed step by step. The peer "copy" is the memory's limit: the bytes that a
crossing has to move at the least, at the speed at which this device copies a large tensor; ours over it is the share of
that limit which is reached. For N tokens of width d, with h of one precision and s of another, the least is

    forward                 read h, s; write h', s'
    forward and backward    that, then read h, s, dh', ds'; write dh, ds

Parameters and low-rank intermediates are some tens of numbers a token beside d, and are not counted; s' is not read
again, for it follows from h and s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import nn

from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, check_known, integers, option, words
from shadowtune.benchmark.timing import DTYPES, TimedSubject
from shadowtune.config.checking import check_choices
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries, Kernel
from shadowtune.errors import ConfigError

OURS = "shadow"
PEERS = (*(kernel for kernel in get_args(Kernel) if kernel != "auto"), "copy")
FORWARD, BACKWARD = "forward", "forward+backward"
PASSES = {FORWARD: 4, BACKWARD: 10}
"""How often, at the least, N x d numbers are read or written; half of them are of h's precision, half of s's."""
COPY_BYTES = 2**28
"""Size of the tensor that is copied: more than any cache holds."""


@dataclass(frozen=True)
class BoundarySettings(Settings):
    """Settings of ``bench boundary``."""

    peers: tuple[str, ...] = option(("reference", "copy"), f"with what: any of {', '.join(PEERS)}", words)
    tokens: tuple[int, ...] = option((1024, 4096), "tokens that cross at once, each two cases", integers)
    width: int = option(576, "d, the width of the base", int)
    rank: int = option(16, "r, the width of the injection's bottleneck", int)
    update_width: int = option(8, "k, the hidden width of transform and gate", int)
    dropout: float = option(0.2, "as in training; the forward pass alone is that of inference, without", float)
    adapter_dtype: str = option("float32", "precision of the parameters and the state: float32 or bfloat16")
    bounds = {
        **Settings.bounds,
        "width": (1, None),
        "rank": (1, None),
        "update_width": (1, None),
        "dropout": (0, 1),
    }
    counts = ("tokens",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, adapter_dtype=tuple(DTYPES))


def plan(settings: BoundarySettings) -> Plan:
    """Plan two cases, forward and forward+backward, for each number of tokens.

    Raises:
        ConfigError: if a peer is unknown, or there is none.
    """
    check_known(settings.peers, PEERS)
    if not settings.peers:
        raise ConfigError(f"no peer to compare with; choose from {', '.join(PEERS)}")
    cases = [
        Case(f"{direction} tokens={tokens}", {"direction": direction, "tokens": tokens})
        for direction in PASSES
        for tokens in settings.tokens
    ]
    return Plan({name: {} for name in (OURS, *settings.peers)}, tuple(cases))


def least_bytes(settings: BoundarySettings, direction: str, tokens: int) -> int:
    """Return the bytes that one crossing has to move: half the passes are of h's kind, half of s's."""
    pair = DTYPES[settings.dtype].itemsize + DTYPES[settings.adapter_dtype].itemsize
    return PASSES[direction] // 2 * tokens * settings.width * pair


class CrossingSubject(TimedSubject):
    """A boundary that refines and injects, with parameters that are not at their start, crossed again and again."""

    def __init__(self, settings: BoundarySettings, kernel: Kernel) -> None:
        super().__init__(settings)
        torch.manual_seed(0)
        self.settings = settings
        config = ShadowConfig(rank=settings.rank, update_width=settings.update_width, dropout=settings.dropout)
        self.boundaries = Boundaries(2, settings.width, config)  # the first of the two injects only
        self.boundaries.kernel = kernel
        nn.init.normal_(self.boundaries.injection_ups, std=config.init_std)
        self.boundaries.to(self.device, DTYPES[settings.adapter_dtype])
        self.mark_loaded(self.boundaries)
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.gradients: tuple[torch.Tensor, ...] | None = None

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make h and s, and for the way back dh' and ds'; return the peak memory of a crossing in MB, they included."""
        shape = (1, values["tokens"], self.settings.width)
        backward = values["direction"] == BACKWARD
        generator = torch.Generator().manual_seed(0)
        kinds = (DTYPES[self.settings.dtype], DTYPES[self.settings.adapter_dtype])
        drawn = [torch.randn(shape, generator=generator).to(self.device, kind) for kind in (*kinds, *kinds)]
        self.inputs = tuple(tensor.requires_grad_(backward) for tensor in drawn[:2])
        self.gradients = tuple(drawn[2:]) if backward else None
        self.boundaries.train(backward)
        return self.warm()

    def measure(self) -> float:
        """Crossings per second."""
        return self.steps_per_second()

    def _step(self) -> None:
        if self.gradients is None:
            with torch.no_grad():
                self.boundaries(1, *self.inputs)
            return
        crossed = self.boundaries(1, *self.inputs)
        torch.autograd.grad(crossed, (*self.inputs, *self.boundaries.parameters()), self.gradients)


class CopySubject(TimedSubject):
    """Copies a large tensor and says how many crossings that speed would allow."""

    def __init__(self, settings: BoundarySettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.source = torch.ones(COPY_BYTES // 4, device=self.device)
        self.target = torch.empty_like(self.source).zero_()
        self.least = 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Note what a crossing moves. A copy needs no memory of its own."""
        self.least = least_bytes(self.settings, values["direction"], values["tokens"])
        self.warm()
        return 0.0

    def measure(self) -> float:
        """Crossings per second, if each moved its least bytes at this speed; a copy reads and writes every byte."""
        return self.steps_per_second() * 2 * self.source.nbytes / self.least

    def _step(self) -> None:
        self.target.copy_(self.source)


def open_subject(settings: BoundarySettings, name: str) -> CrossingSubject | CopySubject:
    """Make a subject of ``bench boundary``."""
    if name == "copy":
        return CopySubject(settings)
    return CrossingSubject(settings, cast(Kernel, "auto" if name == OURS else name))


BOUNDARY = Bench(
    name="boundary",
    help="one boundary between two blocks: crossings per second, and how near the memory's limit",
    unit="operations_per_second",
    settings=BoundarySettings,
    context=("device", "dtype", "adapter_dtype", "width", "rank", "update_width", "dropout", "warm_up"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench boundary                      half a minute: against the step-by-step reference, and a plain copy
  shadowtune bench boundary --tokens 8192 --width 4096 --device cuda --dtype bfloat16 --adapter-dtype bfloat16

The ratio to the peer copy is the share of the device's copy bandwidth that a crossing reaches.
""",
)
