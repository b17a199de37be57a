"""Benchmarks of greedy generation with a cache: ``decode`` (``generate``) and ``evaluate`` (held-out prompts).

``decode``: new tokens per second, the prefill included. Each package generates as its users call it, without a cache if
it has none. Adapters are perturbed. The candidates that end in "-compiled" keep a static cache and compile the step of
one token.

``evaluate``: tokens per second of answers, the prefill included. Evaluation answers in left-padded batches with a
cache. The baselines do what evaluation scripts often do: one prompt at a time, with a cache ("one-by-one") or reading
everything again for each token ("uncached"). All answer the same random prompts by the same attached model.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import CompileConfig

from benchmarks.bases import MODEL_HELP, base_config, base_tokenizer, check_length
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, integers, option, words
from benchmarks.measurement import DTYPES, ModelCandidate, perturb
from benchmarks.methods import METHODS, OURS, check_baselines, equal_budgets
from shadowtune.config.settings import check_choices
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.generation import generate_answers
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.modeling import Mode


@dataclass(frozen=True)
class Decoder:
    """A method and its way of generation."""

    method: str
    mode: Mode = "attached"
    """Of ours."""
    compiled: bool = False


DECODERS: dict[str, Decoder] = {
    **{name: Decoder(name) for name in METHODS},
    "shadow-detached": Decoder(OURS, mode="detached"),
    "shadow-compiled": Decoder(OURS, compiled=True),
    "lora-compiled": Decoder("lora", compiled=True),
    "base-compiled": Decoder("base", compiled=True),
}
"""What can be measured, by name."""
DECODE_CANDIDATES = tuple(name for name, decoder in DECODERS.items() if decoder.method == OURS)


class CompiledEverywhere(CompileConfig):
    """Makes ``generate`` compile on a CPU too, where it does not by default; one graph for each batch shape."""

    _compile_all_devices = True  # type: ignore[assignment] # transformers' own switch, untyped

    def __init__(self) -> None:
        super().__init__(fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """Settings of ``decode``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    candidate: str = option(OURS, f"what is compared: {', '.join(DECODE_CANDIDATES)}")
    baselines: tuple[str, ...] = option(
        ("base", "lora", "peft-shadow", "shadow-peft"), f"with what: any of {', '.join(DECODERS)}", words
    )
    batch: tuple[int, ...] = option((1, 8), "sequences that are generated at once, each a case", integers)
    prompt: int = option(64, "tokens of each prompt", int)
    new: int = option(128, "tokens generated for each sequence", int)
    parameters: int | None = option(None, "trained parameters of each; default: those of the default shadow", int)
    adapter_dtype: str = option("float32", "precision of the trained parameters: float32 or bfloat16")
    bounds = {**Settings.bounds, "prompt": (1, None), "new": (2, None), "parameters": (1, None)}
    counts = ("batch",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, candidate=DECODE_CANDIDATES, adapter_dtype=tuple(DTYPES))


def plan_decode(settings: DecodeSettings) -> BenchmarkPlan:
    """Choose sizes that make the budgets equal; one case for each batch size.

    Raises:
        ShadowtuneError: if a baseline is unknown or not installed, the base cannot be found or is too
            short, or there are no equal budgets.
    """
    check_baselines(settings.baselines, {name: METHODS[decoder.method] for name, decoder in DECODERS.items()})
    if settings.candidate in settings.baselines:
        raise ConfigError(f"{settings.candidate} is compared with itself; leave it out of --baselines")
    config = base_config(settings.model)
    check_length(config, settings.prompt + settings.new, settings.model)
    names = (settings.candidate, *settings.baselines)
    sizes = equal_budgets(config, [DECODERS[name].method for name in names], settings.parameters)
    candidates = {name: {"size": sizes[DECODERS[name].method]} for name in names}
    cases = tuple(Case(f"batch={batch}", {"batch": batch}) for batch in settings.batch)
    return BenchmarkPlan(candidates, cases)


class DecodeCandidate(ModelCandidate):
    """A model that generates from random prompts."""

    def __init__(self, settings: DecodeSettings, name: str, size: int | None) -> None:
        super().__init__(settings)
        decoder = DECODERS[name]
        self.settings, self.name = settings, name
        self.load(settings.model, METHODS[decoder.method], size)
        self.model.eval()
        if isinstance(self.model, ShadowForCausalLM):
            self.model.set_mode(decoder.mode)
        perturb(self.model, DTYPES[settings.adapter_dtype])
        self.mark_loaded(self.model)
        self.prepacked = ExitStack()
        if isinstance(self.model, ShadowForCausalLM):  # as the CLI and the server run it, until this process ends
            self.prepacked.enter_context(prepacked_linear(self.model))
        self.options: dict[str, Any] = {
            "do_sample": False,
            "min_new_tokens": settings.new,
            "max_new_tokens": settings.new,
            "pad_token_id": 0,
        }
        if decoder.compiled:
            self.options |= {"cache_implementation": "static", "compile_config": CompiledEverywhere()}
        self.prompts: dict[str, torch.Tensor] = {}

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Draw ``batch`` prompts and warm up; return the peak memory of generating in MB."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (values["batch"], self.settings.prompt), generator=generator)
        prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.prompts = {name: tensor.to(self.device) for name, tensor in prompts.items()}
        self._step()
        self.mark_loaded(self.model)  # what the first call builds, mainly compiled code, is no memory of a step
        return self.warm()

    def measure(self) -> float:
        """New tokens per second, of all sequences together."""
        return len(self.prompts["input_ids"]) * self.settings.new * self.steps_per_second()

    def generate(self) -> torch.Tensor:
        """Return prompts and new tokens, (batch, prompt + new)."""
        return cast(Any, self.model).generate(**self.prompts, **self.options)

    def _step(self) -> None:
        length = self.generate().shape[1] - self.settings.prompt
        if length != self.settings.new:
            raise ShadowtuneError(f"{self.name} generated {length} tokens, not {self.settings.new}; leave it out")


DECODE = Benchmark(
    name="decode",
    help="greedy generation with a cache: new tokens per second",
    unit="tokens_per_second",
    settings=DecodeSettings,
    context=("model", "device", "dtype", "adapter_dtype", "prompt", "new", "warm_up"),
    plan=plan_decode,
    open=DecodeCandidate,
    examples="""examples:
  python -m benchmarks decode --model tiny           under a minute: a random base, to see how it works
  python -m benchmarks decode --candidate shadow-compiled --baselines base,base-compiled,shadow --batch 1
  python -m benchmarks decode --model path/or/hub-id --device cuda --dtype bfloat16 --adapter-dtype bfloat16
""",
)


BATCHED = "batched"
LOOPS: dict[str, bool] = {"one-by-one": True, "uncached": False}
"""The baselines, which answer one prompt at a time, and whether they keep a cache."""


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """Settings of ``evaluate``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    baselines: tuple[str, ...] = option(tuple(LOOPS), f"with what: any of {', '.join(LOOPS)}", words)
    batch: int = option(32, "prompts that evaluation answers at once", int)
    rows: int = option(32, "prompts of each sample", int)
    prompt: int = option(64, "tokens of the longest prompt; the shortest has a quarter", int)
    new: tuple[int, ...] = option((16,), "most tokens of an answer, each a case", integers)
    bounds = {**Settings.bounds, "batch": (1, None), "rows": (1, None), "prompt": (4, None)}
    counts = ("new",)


def plan_evaluate(settings: EvaluateSettings) -> BenchmarkPlan:
    """Check names and lengths; one case for each length of answers.

    Raises:
        ShadowtuneError: if a baseline is unknown, or the base cannot be found or is too short.
    """
    check_known(settings.baselines, LOOPS)
    if not settings.baselines:
        raise ConfigError(f"--baselines must name some of {', '.join(LOOPS)}")
    check_length(base_config(settings.model), settings.prompt + max(settings.new), settings.model)
    return BenchmarkPlan(
        {name: {} for name in (BATCHED, *settings.baselines)},
        tuple(Case(f"new={new}", {"new": new}) for new in settings.new),
    )


class EvaluateCandidate(ModelCandidate):
    """An attached model that answers all prompts."""

    def __init__(self, settings: EvaluateSettings, name: str) -> None:
        super().__init__(settings)
        self.load(settings.model, METHODS[OURS], None)
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
        self.new = self.answer_tokens = 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up; return the peak memory of answering, MB."""
        self.new = values["new"]
        return self.warm()

    def measure(self) -> float:
        """Tokens of the answers per second."""
        return self.steps_per_second() * self.answer_tokens

    def answers(self) -> list[list[int]]:
        """Answer all prompts, in token ids."""
        return generate_answers(self.model, self.tokenizer, self.prompts, self.new, self.batch)[1]

    def _step(self) -> None:
        self.answer_tokens = sum(len(answer) for answer in self.answers())


def _prompts(rows: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Return random prompts of evenly spread lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest // 4, longest, rows).round().long().tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


EVALUATE = Benchmark(
    name="evaluate",
    help="answers to held-out prompts, in batches and one at a time: tokens per second",
    unit="tokens_per_second",
    settings=EvaluateSettings,
    context=("model", "device", "dtype", "batch", "rows", "prompt", "warm_up"),
    plan=plan_evaluate,
    open=EvaluateCandidate,
    examples="""examples:
  python -m benchmarks evaluate --model tiny                  seconds: a random base, to see how it works
  python -m benchmarks evaluate --new 16,128 --repeats 3      short and long answers
""",
)
