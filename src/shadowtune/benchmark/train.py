"""``bench train``: a whole training step - forward, backward, AdamW, zero_grad - in tokens per second, and its memory.

Ours computes logits at labelled positions only; each peer runs its own forward pass with labels, as its users would.
The peer "base" runs the bare base's forward pass with labels and trains nothing: that is what the model itself costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shadowtune.benchmark.bases import MODEL_HELP, base_config, check_length
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, numbers, option, words
from shadowtune.benchmark.peers import CONTENDERS, PEERS, check_peers, equal_budgets
from shadowtune.benchmark.subject import ModelSubject
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of ``bench train``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    peers: tuple[str, ...] = option(tuple(PEERS), "what ours is compared with", words)
    labelled: tuple[float, ...] = option(
        (1.0, 0.25, 0.02), "shares of the tokens that have a label, each a case", numbers
    )
    batch: int = option(4, "rows of a batch", int)
    length: int = option(256, "tokens of a row", int)
    parameters: int | None = option(None, "trainable parameters of each; default: those of the default shadow", int)
    bounds = {**Settings.bounds, "batch": (1, None), "length": (2, None), "parameters": (1, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.labelled or not all(0 < share <= 1 for share in self.labelled):
            raise ConfigError(f"labelled must be shares above 0 and up to 1, got {self.labelled}")


def plan(settings: TrainSettings) -> Plan:
    """Choose sizes that make the budgets equal; a case for each share of labelled tokens.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown or not installed, the base cannot be found or is too
            short, or there are no equal budgets.
    """
    subjects = plan_subjects(settings.model, settings.peers, settings.length, settings.parameters)
    shape = {"rows": settings.batch, "length": settings.length}
    return Plan(
        subjects, tuple(Case(f"labelled={share:g}", {**shape, "labelled": share}) for share in settings.labelled)
    )


def check_share(labelled: float) -> None:
    """Raise ConfigError unless a share of labelled tokens is one."""
    if not 0 < labelled <= 1:
        raise ConfigError(f"labelled must be a share above 0 and up to 1, got {labelled}")


def plan_subjects(
    model: str, peers: Sequence[str], longest: int, parameters: int | None
) -> dict[str, dict[str, int | None]]:
    """Choose the sizes of ours and of peers that step over rows of up to ``longest`` tokens; raises as ``plan``."""
    check_peers(peers)
    config = base_config(model)
    check_length(config, longest, model)
    return {name: {"size": size} for name, size in equal_budgets(config, peers, parameters).items()}


class SteppingSubject(ModelSubject):
    """A model and its optimizer, stepping over one random batch; a subclass loads it, once or case by case."""

    optimizer: torch.optim.Optimizer | None
    batch: dict[str, torch.Tensor]

    def start_training(self) -> None:
        """Put the model into training, with AdamW for what it trains."""
        self.model.train(self.trainable_parameters > 0)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.mark_loaded(self.model)

    def make_batch(self, rows: int, length: int, labelled: float) -> None:
        """Draw a batch; the last share ``labelled`` of each row has labels, as a completion has."""
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


class TrainSubject(SteppingSubject):
    """One model, loaded at once."""

    def __init__(self, settings: Settings, base_name: str, name: str, size: int | None) -> None:
        super().__init__(settings)
        self.load(base_name, CONTENDERS[name], size)
        self.start_training()

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Make the batch; warm up; return the step's peak MB."""
        self.make_batch(**values)
        return self.warm()

    def measure(self) -> float:
        """Tokens per second, those without a label included."""
        return self.batch["input_ids"].numel() * self.steps_per_second()


def open_subject(settings: TrainSettings, name: str, **arguments: Any) -> TrainSubject:
    """Load a subject of ``bench train``."""
    return TrainSubject(settings, settings.model, name, **arguments)


TRAIN = Bench(
    name="train",
    help="a full training step: tokens per second and peak memory",
    unit="tokens_per_second",
    settings=TrainSettings,
    context=("model", "device", "dtype", "batch", "length", "warm_up"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench train --model tiny            under a minute: a random base, to see how it works
  shadowtune bench train --peers lora,peft-shadow --labelled 0.02 --json result.json
  shadowtune bench train --model path/or/hub-id --device cuda --dtype bfloat16
  shadowtune bench train --model smollm2-135m:10 --peers lora     its first 10 blocks: how costs grow with the depth
""",
)
