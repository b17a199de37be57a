"""``bench evaluate``: how fast held-out prompts are answered, in tokens per second, prompts' passes included.

Evaluation answers them in batches, padded on the left, with a cache. The peers do what evaluation scripts often do: one
prompt at a time, with a cache ("one-by-one") or reading everything again for each token ("uncached"). All answer the
same random prompts of different lengths by the same attached model, greedily.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from shadowtune.benchmark.bases import MODEL_HELP, base_config, base_tokenizer, check_length
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, check_known, integers, option, words
from shadowtune.benchmark.decode import perturb
from shadowtune.benchmark.peers import CONTENDERS, OURS
from shadowtune.benchmark.subject import ModelSubject
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.generation import generate_answers
from shadowtune.errors import ConfigError

BATCHED = "batched"
LOOPS: dict[str, bool] = {"one-by-one": True, "uncached": False}
"""Peers, and whether they keep a cache."""


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """Settings of ``bench evaluate``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    peers: tuple[str, ...] = option(tuple(LOOPS), f"with what: any of {', '.join(LOOPS)}", words)
    batch: int = option(32, "rows that evaluation answers at once", int)
    rows: int = option(32, "prompts of each sample", int)
    prompt: int = option(64, "tokens of the longest prompt; the shortest has a quarter", int)
    new: tuple[int, ...] = option((16,), "most tokens of an answer, each a case", integers)
    bounds = {**Settings.bounds, "batch": (1, None), "rows": (1, None), "prompt": (4, None)}
    counts = ("new",)


def plan(settings: EvaluateSettings) -> Plan:
    """Check that all is known and fits; a case for each length of answers.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown, or the base cannot be found or is too short.
    """
    check_known(settings.peers, LOOPS)
    if not settings.peers:
        raise ConfigError(f"--peers must name some of {', '.join(LOOPS)}")
    check_length(base_config(settings.model), settings.prompt + max(settings.new), settings.model)
    return Plan(
        {name: {} for name in (BATCHED, *settings.peers)},
        tuple(Case(f"new={new}", {"new": new}) for new in settings.new),
    )


class EvaluateSubject(ModelSubject):
    """A model that answers all prompts."""

    def __init__(self, settings: EvaluateSettings, name: str) -> None:
        super().__init__(settings)
        self.load(settings.model, CONTENDERS[OURS], None)
        perturb(self.model, torch.float32)
        self.mark_loaded(self.model.eval())
        self.prepacked = ExitStack()
        self.prepacked.enter_context(prepacked_linear(self.model))  # as evaluate runs it, until this process ends
        self.tokenizer = base_tokenizer(settings.model)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = 0
        self.batch = settings.batch if name == BATCHED else 1
        model: Any = self.model
        model.generation_config.use_cache = LOOPS.get(name, True)
        self.prompts = _prompts(settings.rows, settings.prompt, self.vocabulary)
        self.new = self.said = 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up; return the peak memory of answering, MB."""
        self.new = values["new"]
        return self.warm()

    def measure(self) -> float:
        """Tokens of the answers per second."""
        return self.steps_per_second() * self.said

    def answers(self) -> list[list[int]]:
        """Answer all prompts, in token ids."""
        return generate_answers(self.model, self.tokenizer, self.prompts, self.new, self.batch)[1]

    def _step(self) -> None:
        self.said = sum(len(answer) for answer in self.answers())


def _prompts(rows: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of evenly spread lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest // 4, longest, rows).round().long().tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def open_subject(settings: EvaluateSettings, name: str) -> EvaluateSubject:
    """Load a subject of ``bench evaluate``."""
    return EvaluateSubject(settings, name)


EVALUATE = Bench(
    name="evaluate",
    help="answers to held-out prompts, in batches and one at a time: tokens per second",
    unit="tokens_per_second",
    settings=EvaluateSettings,
    context=("model", "device", "dtype", "batch", "rows", "prompt", "warm_up"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench evaluate --model tiny                  seconds: a random base, to see how it works
  shadowtune bench evaluate --new 16,128 --repeats 3      short and long answers
""",
)
