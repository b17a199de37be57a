"""``bench memory``: the most memory that a training step, or reading a prompt, takes above the loaded model, in MB.

Here a ratio below 1 is good: it is ours over the peer's memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shadowtune.benchmark.bases import MODEL_HELP
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, integers, option, words
from shadowtune.benchmark.peers import PEERS
from shadowtune.benchmark.train import TrainSubject, check_share, plan_subjects
from shadowtune.errors import ConfigError

PHASES = ("train", "prompt")


@dataclass(frozen=True)
class MemorySettings(Settings):
    """Settings of ``bench memory``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    peers: tuple[str, ...] = option(tuple(PEERS), "what ours is compared with", words)
    phases: tuple[str, ...] = option(PHASES, f"what is done: any of {', '.join(PHASES)}", words)
    lengths: tuple[int, ...] = option((128, 256, 512), "tokens of a row, each a case", integers)
    batch: int = option(4, "rows of a batch", int)
    labelled: float = option(1.0, "share of the tokens that have a label in training", float)
    parameters: int | None = option(None, "trainable parameters of each; default: those of the default shadow", int)
    bounds = {**Settings.bounds, "batch": (1, None), "parameters": (1, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise ConfigError(f"phases must be some of {', '.join(PHASES)}, got {', '.join(self.phases) or 'none'}")
        check_share(self.labelled)
        if not self.lengths or min(self.lengths) < 2:
            raise ConfigError(f"lengths must be numbers of at least 2, got {self.lengths}")


def plan(settings: MemorySettings) -> Plan:
    """Choose sizes that make the budgets equal; a case for each phase and length.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown or not installed, the base cannot be found or is too
            short, or there are no equal budgets.
    """
    subjects = plan_subjects(settings.model, settings.peers, max(settings.lengths), settings.parameters)
    cases = tuple(
        Case(
            f"{phase}, {settings.batch} x {length} tokens",
            {"phase": phase, "rows": settings.batch, "length": length, "labelled": settings.labelled},
        )
        for phase in settings.phases
        for length in settings.lengths
    )
    return Plan(subjects, cases)


class MemorySubject(TrainSubject):
    """A model that trains, or reads prompts and keeps their cache; each sample is the peak of one step."""

    phase = PHASES[0]

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make the batch, and the first step, which makes what the optimizer keeps."""
        self.phase = values["phase"]
        self.make_batch(values["rows"], values["length"], values["labelled"])
        self.model.train(self.phase == "train" and self.optimizer is not None)
        self._step()
        self.mark_loaded(self.model)
        return self.measure()

    def measure(self) -> float:
        """Peak of one step, MB; not 0, for it is divided by."""
        self.memory.restart()
        self._step()
        peak = self.memory.peak_mb() - self.loaded_mb
        self.memory.give_back()
        return max(peak, 1e-3)

    def _step(self) -> None:
        if self.phase == "train":
            super()._step()
            return
        prompt = {name: tensor for name, tensor in self.batch.items() if name != "labels"}
        with torch.no_grad():
            self.model(**prompt, use_cache=True, logits_to_keep=1)


def open_subject(settings: MemorySettings, name: str, **arguments: Any) -> MemorySubject:
    """Load a subject of ``bench memory``."""
    return MemorySubject(settings, settings.model, name, **arguments)


MEMORY = Bench(
    name="memory",
    help="peak memory of a training step and of reading a prompt, above the loaded model",
    unit="mb",
    settings=MemorySettings,
    context=("model", "device", "dtype", "batch", "labelled"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench memory --model tiny --lengths 32,64       under a minute: a random base, to see how it works
  shadowtune bench memory --phases train --lengths 256,1024 --batch 1 --peers lora,peft-shadow
""",
)
