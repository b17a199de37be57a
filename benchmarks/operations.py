r"""Benchmarks of single operations: ``boundary`` (update and injection) and ``head`` (the joint loss of both networks).

``boundary``: one boundary, forward and forward with backward. The baseline "reference" is the same module, computed
step by step. The baseline "copy" is the limit of the memory: the least bytes that a boundary has to move, at the speed
at which this device copies a large tensor; ours over it is the share of that limit. For N tokens of width d the least
is

    forward                 read h, s; write h', s'
    forward and backward    that, then read h, s, dh', ds'; write dh, ds

Parameters and low-rank intermediates are some tens of numbers a token beside d, and are not counted; s' is not read
again, for it follows from h and s.

``head``: the joint loss behind the language model head and its gradients, for N labelled positions of each network.
Ours is a fused linear cross-entropy; "all-logits" makes (N, V) logits for autograd; "liger" is the fused loss of
liger-kernel, once for each network (CUDA devices only). With "distilled" the divergence of the attached model from the
shadow is part of the loss, which liger-kernel's has not.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, integers, option, words
from benchmarks.measurement import DTYPES, TimedCandidate
from shadowtune.config.settings import check_choices
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries, Kernel
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import linear_cross_entropy, linear_cross_entropy_reference
from shadowtune.errors import ConfigError, ShadowtuneError

OURS = "shadow"
BOUNDARY_BASELINES = (*(kernel for kernel in get_args(Kernel) if kernel != "auto"), "copy")
FORWARD, BACKWARD = "forward", "forward+backward"
PASSES = {FORWARD: 4, BACKWARD: 10}
"""Least number of times that N x d numbers are read or written; half in h's precision, half in s's."""
COPY_BYTES = 2**28
"""Size of the copied tensor: larger than any cache."""


@dataclass(frozen=True)
class BoundarySettings(Settings):
    """Settings of ``boundary``."""

    baselines: tuple[str, ...] = option(
        ("reference", "copy"), f"with what: any of {', '.join(BOUNDARY_BASELINES)}", words
    )
    tokens: tuple[int, ...] = option((1024, 4096), "tokens at once, each two cases", integers)
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


def plan_boundary(settings: BoundarySettings) -> BenchmarkPlan:
    """Plan two cases, forward and forward+backward, for each number of tokens.

    Raises:
        ConfigError: if a baseline is unknown, or there is none.
    """
    check_known(settings.baselines, BOUNDARY_BASELINES)
    if not settings.baselines:
        raise ConfigError(f"no baseline to compare with; choose from {', '.join(BOUNDARY_BASELINES)}")
    cases = [
        Case(f"{direction} tokens={tokens}", {"direction": direction, "tokens": tokens})
        for direction in PASSES
        for tokens in settings.tokens
    ]
    return BenchmarkPlan({name: {} for name in (OURS, *settings.baselines)}, tuple(cases))


def least_bytes(settings: BoundarySettings, direction: str, tokens: int) -> int:
    """Return the bytes that one boundary has to move: half the passes in h's precision, half in s's."""
    pair = DTYPES[settings.dtype].itemsize + DTYPES[settings.adapter_dtype].itemsize
    return PASSES[direction] // 2 * tokens * settings.width * pair


class BoundaryCandidate(TimedCandidate):
    """One boundary with update and injection, whose parameters are not at their initial values."""

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
        """Make h and s, for backward also dh' and ds'; return the peak memory of a step in MB, these included."""
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
        """Boundaries per second."""
        return self.steps_per_second()

    def _step(self) -> None:
        if self.gradients is None:
            with torch.no_grad():
                self.boundaries(1, *self.inputs)
            return
        outputs = self.boundaries(1, *self.inputs)
        torch.autograd.grad(outputs, (*self.inputs, *self.boundaries.parameters()), self.gradients)


class CopyCandidate(TimedCandidate):
    """Copies a large tensor; a sample is the number of boundaries per second that this bandwidth allows."""

    def __init__(self, settings: BoundarySettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.source = torch.ones(COPY_BYTES // 4, device=self.device)
        self.target = torch.empty_like(self.source).zero_()
        self.least = 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Compute the bytes of a boundary. A copy needs no memory of its own."""
        self.least = least_bytes(self.settings, values["direction"], values["tokens"])
        self.warm()
        return 0.0

    def measure(self) -> float:
        """Boundaries per second, if each moved its least bytes at this speed; a copy reads and writes every byte."""
        return self.steps_per_second() * 2 * self.source.nbytes / self.least

    def _step(self) -> None:
        self.target.copy_(self.source)


def open_boundary(settings: BoundarySettings, name: str) -> BoundaryCandidate | CopyCandidate:
    """Make a candidate of ``boundary``: an implementation of the boundary, or a copy."""
    if name == "copy":
        return CopyCandidate(settings)
    return BoundaryCandidate(settings, cast(Kernel, "auto" if name == OURS else name))


BOUNDARY = Benchmark(
    name="boundary",
    help="one boundary between two blocks: operations per second, and the share of the memory bandwidth",
    unit="operations_per_second",
    settings=BoundarySettings,
    context=("device", "dtype", "adapter_dtype", "width", "rank", "update_width", "dropout", "warm_up"),
    plan=plan_boundary,
    open=open_boundary,
    examples="""examples:
  python -m benchmarks boundary                      half a minute: against the step-by-step reference, and a plain copy
  python -m benchmarks boundary --tokens 8192 --width 4096 --device cuda --dtype bfloat16 --adapter-dtype bfloat16

The ratio to the baseline copy is the share of the device's copy bandwidth that a boundary reaches.
""",
)


LAMBDA, MU = 0.05, 0.5
"""Weights of the shadow's loss and of the divergence; their values do not matter for the speed."""


@dataclass(frozen=True)
class HeadSettings(Settings):
    """Settings of ``head``."""

    baselines: tuple[str, ...] = option(("all-logits",), "with what: any of all-logits, liger", words)
    rows: tuple[int, ...] = option((32, 1024), "labelled positions of each network, each two cases", integers)
    width: int = option(576, "d, the width of the base", int)
    vocabulary: int = option(49152, "V, tokens of the vocabulary", int)
    bounds = {**Settings.bounds, "width": (1, None), "vocabulary": (2, None)}
    counts = ("rows",)


def plan_head(settings: HeadSettings) -> BenchmarkPlan:
    """Plan two cases, without and with distillation, for each number of positions.

    Raises:
        ConfigError: if a baseline is unknown or cannot run on the device, or there is none.
        ShadowtuneError: if liger-kernel is not installed.
    """
    check_known(settings.baselines, LOSSES)
    if not settings.baselines:
        raise ConfigError(f"no baseline to compare with; choose from {', '.join(LOSSES)}")
    if "liger" in settings.baselines:
        if settings.device != "cuda":
            raise ConfigError("baseline liger runs on CUDA devices only; pass --device cuda or leave it out")
        if importlib.util.find_spec("liger_kernel") is None:
            raise ShadowtuneError("baseline liger needs liger-kernel, which is not installed: pip install liger-kernel")
    cases = [
        Case(f"{kind} rows={rows}", {"distilled": kind == "distilled", "rows": rows})
        for kind in ("joint", "distilled")
        for rows in settings.rows
        if kind == "joint" or "liger" not in settings.baselines
    ]
    return BenchmarkPlan({name: {} for name in (OURS, *settings.baselines)}, tuple(cases))


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""(head's weight, h, s, targets, distilled) -> scalar."""


def _sum(compute: Callable[..., Any], weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    head = Head(lambda x: nn.functional.linear(x, weight), weight)
    sums = compute(head, h, s, targets, 1.0 if distilled else None)
    loss: Tensor = sums.base + LAMBDA * sums.shadow
    return loss if sums.divergence is None else loss + MU * sums.divergence


def _fused(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    return _sum(linear_cross_entropy, weight, h, s, targets, distilled)


def _all_logits(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    return _sum(linear_cross_entropy_reference, weight, h, s, targets, distilled)


def _liger(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss: Tensor = fused(weight, h, targets) + LAMBDA * fused(weight, s, targets)
    return loss


LOSSES: dict[str, Loss] = {"all-logits": _all_logits, "liger": _liger}
"""The baselines."""


class HeadCandidate(TimedCandidate):
    """A frozen language model head and random hidden states of both networks."""

    def __init__(self, settings: HeadSettings, name: str) -> None:
        super().__init__(settings)
        self.settings, self.loss = settings, _fused if name == OURS else LOSSES[name]
        self.head = nn.Linear(settings.width, settings.vocabulary, bias=False, dtype=DTYPES[settings.dtype])
        self.head.to(self.device).requires_grad_(False)
        self.mark_loaded(self.head)
        self.hidden: tuple[Tensor, Tensor] | None = None
        self.targets = torch.empty(0)
        self.distilled = False

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Draw hidden states and targets; return the peak memory of a loss with its gradients in MB."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, values["rows"], self.settings.width)
        h, s = torch.randn(shape, generator=generator).to(self.device, self.head.weight.dtype)
        self.hidden = (h.requires_grad_(), s.requires_grad_())
        targets = torch.randint(self.settings.vocabulary, shape[1:2], generator=generator)
        self.targets, self.distilled = targets.to(self.device), values["distilled"]
        return self.warm()

    def measure(self) -> float:
        """Losses with their gradients a second."""
        return self.steps_per_second()

    def _step(self) -> None:
        assert self.hidden is not None
        torch.autograd.grad(self.loss(self.head.weight, *self.hidden, self.targets, self.distilled), self.hidden)


HEAD = Benchmark(
    name="head",
    help="the joint loss behind the head, with its gradients: fused against all logits",
    unit="operations_per_second",
    settings=HeadSettings,
    context=("device", "dtype", "width", "vocabulary", "warm_up"),
    plan=plan_head,
    open=HeadCandidate,
    examples="""examples:
  python -m benchmarks head                          a minute: SmolLM2's head, with and without distillation
  python -m benchmarks head --baselines all-logits,liger --rows 2048 --width 4096 --vocabulary 151936 --device cuda \\
      --dtype bfloat16
""",
)
