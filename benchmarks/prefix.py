"""Benchmark ``prefix``: first tokens of adapters behind one shared prompt, with and without the engine's prefix cache.

In each round every adapter gets one request at once; all prompts begin with the same tokens, new ones in each round,
which end with ``shadow.injection_after``. So "shared" computes them once a round and "unshared" once for each adapter.
Facts: the mean and the longest time to the first token, over the requests of a round.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.bases import MODEL_HELP, base_config, base_tokenizer, check_length, load_benchmark_base
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, integers, option
from benchmarks.measurement import DTYPES, TimedCandidate, perturb
from shadowtune.config.settings import check_choices
from shadowtune.config.shadow import ShadowConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import GenerationRequest, SamplingParams

MARKER = (1, 2)
"""Token ids that end the shared prompt; random tokens begin at 3."""
QUESTION = 32
"""Tokens of each prompt behind the shared ones."""


@dataclass(frozen=True)
class PrefixSettings(Settings):
    """Settings of ``prefix``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    variant: str = option("stateless", "boundaries of the adapters: paper or stateless")
    adapters: int = option(16, "adapters, each with one request at a time", int)
    shared: tuple[int, ...] = option((512, 2000), "tokens of the shared prompt, each a case", integers)
    bounds = {**Settings.bounds, "adapters": (1, None)}
    counts = ("shared",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, variant=("paper", "stateless"))


def plan_prefix(settings: PrefixSettings) -> BenchmarkPlan:
    """Check the lengths; one case for each shared prompt.

    Raises:
        ConfigError: if the base has too few positions.
    """
    check_length(base_config(settings.model), max(settings.shared) + len(MARKER) + QUESTION + 1, settings.model)
    cases = tuple(Case(f"shared={count}", {"shared": count}) for count in settings.shared)
    return BenchmarkPlan({"shared": {}, "unshared": {}}, cases)


class PrefixCandidate(TimedCandidate):
    """An engine with or without a prefix cache, and one request to each of its adapters at once."""

    def __init__(self, settings: PrefixSettings, name: str) -> None:
        super().__init__(settings)
        torch.manual_seed(0)
        base = load_benchmark_base(settings.model, DTYPES[settings.dtype], self.device)
        config = ShadowConfig(variant=settings.variant, injection_after=MARKER, rank=16)
        models = [ShadowForCausalLM.from_base(base, config) for _ in range(settings.adapters)]
        for model in models:
            perturb(model, torch.float32)
        self.mark_loaded(nn.ModuleList(models))
        self.names = [f"adapter-{index}" for index in range(settings.adapters)]
        loaded = {name: (model.eval(), PromptFormat()) for name, model in zip(self.names, models, strict=True)}
        tokens = max(settings.shared) + len(MARKER) if name == "shared" else 0
        limits = Limits(max_sequences=settings.adapters, prefix_tokens=tokens, speculation=None)
        self.engine = Engine(base, base_tokenizer(settings.model), loaded, limits)
        self.vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.shared, self.seconds = 0, list[float]()

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up; return the peak memory of a round, MB."""
        self.shared = values["shared"]
        peak = self.warm()
        mean, longest = sum(self.seconds) / len(self.seconds), max(self.seconds)
        self.facts = {"mean_seconds_to_first_token": mean, "longest_seconds_to_first_token": longest}
        return peak

    def measure(self) -> float:
        """First tokens per second over all adapters."""
        return self.steps_per_second() * len(self.names)

    def _step(self) -> None:
        asyncio.run(self._round())

    async def _round(self) -> None:
        shared = [*self._tokens(self.shared), *MARKER]
        requests = [self._request(name, [*shared, *self._tokens(QUESTION)]) for name in self.names]
        self.seconds = list(await asyncio.gather(*(self._ask(request) for request in requests)))

    async def _ask(self, request: GenerationRequest) -> float:
        start, first = time.perf_counter(), 0.0
        async for _ in await self.engine.generate(request):
            first = first or time.perf_counter() - start
        return first

    def _tokens(self, count: int) -> list[int]:
        drawn: list[int] = torch.randint(3, self.vocabulary, (count,), generator=self.generator).tolist()
        return drawn

    def _request(self, name: str, prompt: list[int]) -> GenerationRequest:
        return GenerationRequest(
            name, prompt=prompt, max_tokens=1, sampling=SamplingParams(temperature=0), ignore_eos=True
        )


PREFIX = Benchmark(
    name="prefix",
    help="adapters behind one shared prompt, with and without the prefix cache: first tokens per second",
    unit="first_tokens_per_second",
    settings=PrefixSettings,
    context=("model", "variant", "device", "dtype", "adapters"),
    facts=("mean_seconds_to_first_token", "longest_seconds_to_first_token"),
    plan=plan_prefix,
    open=PrefixCandidate,
    examples="""examples:
  python -m benchmarks prefix --model tiny --adapters 4        under a minute: a random base
  python -m benchmarks prefix                                  16 adapters, prompts of 512 and 2000 tokens
""",
)
