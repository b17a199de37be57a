"""Benchmark ``serving``: the engine of ``serve cloud`` with many streams at once, in new tokens per second.

Prompts are random tokens and all answers have the same length; the prefill is included. "mixed" answers streams of
several adapters in one batch, "batched" as many of one adapter, "alone" the same one after the other; all by the same
engine, without drafts. Fact: ``tokens_per_pass``, new tokens for each pass of the base.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.bases import MODEL_HELP, base_config, base_tokenizer, check_length, load_benchmark_base
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, integers, option, words
from benchmarks.measurement import DTYPES, TimedCandidate, perturb
from benchmarks.methods import METHODS, OURS
from shadowtune.config.settings import check_choices
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import GenerationRequest, SamplingParams

MODES = ("mixed", "batched", "alone")
"""The candidates and baselines."""


@dataclass(frozen=True)
class ServingSettings(Settings):
    """Settings of ``serving``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    candidate: str = option("mixed", f"what is compared: {', '.join(MODES)}")
    baselines: tuple[str, ...] = option(("batched", "alone"), f"with what: any of {', '.join(MODES)}", words)
    streams: tuple[int, ...] = option((16,), "requests at once, each a case", integers)
    adapters: int = option(4, "adapters that the streams of mixed are spread over", int)
    prompt: int = option(32, "tokens of each prompt", int)
    new: int = option(32, "tokens of each answer", int)
    bounds = {**Settings.bounds, "adapters": (1, None), "prompt": (1, None), "new": (1, None)}
    counts = ("streams",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, candidate=MODES)


def plan_serving(settings: ServingSettings) -> BenchmarkPlan:
    """Check names and lengths; one case for each number of streams.

    Raises:
        ConfigError: if a baseline is unknown or the candidate itself, or the base has too few positions.
    """
    check_known(settings.baselines, MODES)
    if not settings.baselines or settings.candidate in settings.baselines:
        raise ConfigError(f"--baselines must name others than {settings.candidate}: any of {', '.join(MODES)}")
    check_length(base_config(settings.model), settings.prompt + settings.new, settings.model)
    cases = tuple(Case(f"streams={streams}", {"streams": streams}) for streams in settings.streams)
    return BenchmarkPlan({name: {} for name in (settings.candidate, *settings.baselines)}, cases)


class ServingCandidate(TimedCandidate):
    """An engine, and concurrent requests to it."""

    def __init__(self, settings: ServingSettings, name: str) -> None:
        super().__init__(settings)
        self.settings, self.name = settings, name
        torch.manual_seed(0)
        base = load_benchmark_base(settings.model, DTYPES[settings.dtype], self.device)
        count = settings.adapters if name == "mixed" else 1
        models = [self._adapter(base) for _ in range(count)]
        self.mark_loaded(nn.ModuleList(models))
        self.names = [f"adapter-{index}" for index in range(count)]
        loaded = {name: (model, PromptFormat()) for name, model in zip(self.names, models, strict=True)}
        limits = Limits(max_sequences=max(settings.streams), speculation=None)
        self.engine = Engine(base, base_tokenizer(settings.model), loaded, limits)
        vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self.prompts = torch.randint(3, vocabulary, (max(settings.streams), settings.prompt)).tolist()
        self.streams = 1

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up with so many streams; return the peak memory of a round, MB."""
        self.streams = values["streams"]
        before = self.engine.counters()
        peak = self.warm()
        after = self.engine.counters()
        new_tokens, passes = (after[name] - before[name] for name in ("completion_tokens", "passes"))
        self.facts = {"tokens_per_pass": new_tokens / passes}
        return peak

    def measure(self) -> float:
        """New tokens per second of all streams."""
        return self.steps_per_second() * self.streams * self.settings.new

    def _step(self) -> None:
        asyncio.run(self._round())

    async def _round(self) -> None:
        requests = [self._request(stream) for stream in range(self.streams)]
        if self.name == "alone":
            answered = [await self._ask(request) for request in requests]
        else:
            answered = await asyncio.gather(*(self._ask(request) for request in requests))
        if any(tokens != self.settings.new for tokens in answered):
            raise ShadowtuneError(f"{self.name} answered with {answered} tokens, not {self.settings.new} each")

    async def _ask(self, request: GenerationRequest) -> int:
        pieces = [piece async for piece in await self.engine.generate(request)]
        usage = pieces[-1].usage
        return 0 if usage is None else usage.completion_tokens

    def _request(self, stream: int) -> GenerationRequest:
        return GenerationRequest(
            self.names[stream % len(self.names)],
            prompt=self.prompts[stream],
            max_tokens=self.settings.new,
            sampling=SamplingParams(temperature=0),
            ignore_eos=True,
        )

    def _adapter(self, base: Any) -> Any:
        model: Any = METHODS[OURS].build(base, None)
        perturb(model, torch.float32)
        return model.to(self.device).eval()


SERVING = Benchmark(
    name="serving",
    help="many streams at once, of one adapter and of several: new tokens per second",
    unit="tokens_per_second",
    settings=ServingSettings,
    context=("model", "device", "dtype", "adapters", "prompt", "new"),
    facts=("tokens_per_pass",),
    plan=plan_serving,
    open=ServingCandidate,
    examples="""examples:
  python -m benchmarks serving --model tiny                                under a minute: a random base
  python -m benchmarks serving                                             4 adapters in a batch, one, and one at a time
  python -m benchmarks serving --candidate batched --baselines alone --streams 4,16
""",
)
