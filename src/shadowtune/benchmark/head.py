"""``bench head``: the joint loss behind the head and its gradients, for N labelled rows of each network, a second.

Ours is one sweep over the vocabulary; "all-logits" makes (N, V) logits and lets autograd see them; "liger" is the fused
loss of liger-kernel, once for each network (CUDA devices only). With "distilled" the divergence of the attached model
from the shadow is part of the loss, which liger-kernel's has not.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, check_known, integers, option, words
from shadowtune.benchmark.timing import DTYPES, TimedSubject
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import linear_cross_entropy, linear_cross_entropy_reference
from shadowtune.errors import ConfigError, ShadowtuneError

OURS = "shadow"
LAMBDA, MU = 0.05, 0.5
"""Weights of the shadow's loss and of the divergence; their values do not matter for the speed."""


@dataclass(frozen=True)
class HeadSettings(Settings):
    """Settings of ``bench head``."""

    peers: tuple[str, ...] = option(("all-logits",), "with what: any of all-logits, liger", words)
    rows: tuple[int, ...] = option((32, 1024), "labelled rows of each network, each two cases", integers)
    width: int = option(576, "d, the width of the base", int)
    vocabulary: int = option(49152, "V, rows of the head", int)
    bounds = {**Settings.bounds, "width": (1, None), "vocabulary": (2, None)}
    counts = ("rows",)


def plan(settings: HeadSettings) -> Plan:
    """Plan two cases, without and with distillation, for each number of rows.

    Raises:
        ConfigError: if a peer is unknown or cannot run on the device, or there is none.
        ShadowtuneError: if liger-kernel is not installed.
    """
    check_known(settings.peers, LOSSES)
    if not settings.peers:
        raise ConfigError(f"no peer to compare with; choose from {', '.join(LOSSES)}")
    if "liger" in settings.peers:
        if settings.device != "cuda":
            raise ConfigError("peer liger runs on CUDA devices only; pass --device cuda or leave it out")
        if importlib.util.find_spec("liger_kernel") is None:
            raise ShadowtuneError("peer liger needs liger-kernel, which is not installed: pip install liger-kernel")
    cases = [
        Case(f"{kind} rows={rows}", {"distilled": kind == "distilled", "rows": rows})
        for kind in ("joint", "distilled")
        for rows in settings.rows
        if kind == "joint" or "liger" not in settings.peers
    ]
    return Plan({name: {} for name in (OURS, *settings.peers)}, tuple(cases))


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""(head's weight, h, s, targets, distilled) -> scalar."""


def _sum(compute: Callable[..., Any], weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    head = Head(lambda x: nn.functional.linear(x, weight), weight)
    sums = compute(head, h, s, targets, 1.0 if distilled else None)
    loss: Tensor = sums.base + LAMBDA * sums.shadow
    return loss if sums.divergence is None else loss + MU * sums.divergence


def _sweep(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    return _sum(linear_cross_entropy, weight, h, s, targets, distilled)


def _all_logits(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    return _sum(linear_cross_entropy_reference, weight, h, s, targets, distilled)


def _liger(weight: Tensor, h: Tensor, s: Tensor, targets: Tensor, distilled: bool) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss: Tensor = fused(weight, h, targets) + LAMBDA * fused(weight, s, targets)
    return loss


LOSSES: dict[str, Loss] = {"all-logits": _all_logits, "liger": _liger}
"""What ours can be measured against."""


class HeadSubject(TimedSubject):
    """A frozen head and random rows of both networks."""

    def __init__(self, settings: HeadSettings, loss: Loss) -> None:
        super().__init__(settings)
        self.settings, self.loss = settings, loss
        self.head = nn.Linear(settings.width, settings.vocabulary, bias=False, dtype=DTYPES[settings.dtype])
        self.head.to(self.device).requires_grad_(False)
        self.mark_loaded(self.head)
        self.rows: tuple[Tensor, Tensor] | None = None
        self.targets = torch.empty(0)
        self.distilled = False

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Draw rows and targets; return the peak memory of a loss with its gradients in MB."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, values["rows"], self.settings.width)
        h, s = torch.randn(shape, generator=generator).to(self.device, self.head.weight.dtype)
        self.rows = (h.requires_grad_(), s.requires_grad_())
        targets = torch.randint(self.settings.vocabulary, shape[1:2], generator=generator)
        self.targets, self.distilled = targets.to(self.device), values["distilled"]
        return self.warm()

    def measure(self) -> float:
        """Losses with their gradients a second."""
        return self.steps_per_second()

    def _step(self) -> None:
        assert self.rows is not None
        torch.autograd.grad(self.loss(self.head.weight, *self.rows, self.targets, self.distilled), self.rows)


def open_subject(settings: HeadSettings, name: str) -> HeadSubject:
    """Make a subject of ``bench head``."""
    return HeadSubject(settings, _sweep if name == OURS else LOSSES[name])


HEAD = Bench(
    name="head",
    help="the joint loss behind the head, with its gradients: one sweep against all logits",
    unit="operations_per_second",
    settings=HeadSettings,
    context=("device", "dtype", "width", "vocabulary", "warm_up"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench head                          a minute: SmolLM2's head, with and without distillation
  shadowtune bench head --peers all-logits,liger --rows 2048 --width 4096 --vocabulary 151936 --device cuda \\
      --dtype bfloat16
""",
)
