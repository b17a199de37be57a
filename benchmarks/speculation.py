"""Benchmarks of speculative decoding: ``speculate`` (whole answers) and ``passes`` (the cost of a pass and a draft).

``speculate``: greedy decoding with drafts and without, in new tokens per second, the prefill included. Prompts are a
task's test examples, others in each round and the same for every candidate; without a task, random tokens, which no
shadow can predict. Each candidate that drafts is first checked against plain decoding. Facts: ``tokens_per_pass``, new
tokens for each pass of the attached model; ``accepted``, the share of accepted tokens by position in the draft.

``passes``: one pass over n new tokens behind a cache, in tokens per second. A draft of n - 1 tokens pays if a pass over
n tokens and n - 1 steps of the drafter take less time than as many passes over one token as tokens are accepted.
Baselines: the bare base; the attached model without prepacked weights ("as-usual"); and n steps of the drafter
("drafting"), which are backbone, head and choice.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from benchmarks.bases import MODEL_HELP, base_config, base_tokenizer, check_length, load_benchmark_base
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, integers, option, words
from benchmarks.measurement import DTYPES, TimedCandidate, perturb
from benchmarks.methods import METHODS, OURS
from shadowtune.attach.cache import split_cache
from shadowtune.config.data import DataConfig
from shadowtune.config.settings import check_choices
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.prepacked_linear import PRODUCTS_BEFORE_PACKING, TRANSPOSED_ROWS, prepacked_linear
from shadowtune.data.collate import left_pad
from shadowtune.data.dataset import Dataset
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.speculation.decoding import Speculator, drop_last
from shadowtune.model.speculation.drafters import make_drafter

DRAFTING: dict[str, SpeculationConfig] = {
    "speculate": SpeculationConfig(),
    **{f"speculate-{length}": SpeculationConfig(length=length) for length in (1, 2, 3, 4, 6, 8)},
    "shadow": SpeculationConfig(drafter="shadow"),
    "shadow-all-tokens": SpeculationConfig(drafter="shadow", draft_vocabulary=False),
    "draft-head": SpeculationConfig(drafter="draft_head"),
    "other-draft-head": SpeculationConfig(drafter="draft_head"),
    "ngram": SpeculationConfig(drafter="ngram"),
}
"""The candidates that draft, with their settings; "other-draft-head" is that of ``other_adapter``."""
OTHERS = ("attached", "assisted", "base", "lora-merged")
"""Plain decoding; transformers' assisted generation by the detached model; the bare base; one with LoRA merged in."""


@dataclass(frozen=True)
class SpeculateSettings(Settings):
    """Settings of ``speculate``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    adapter: str | None = option(None, "a saved shadow of the base, as RUN/model; default: an untrained one")
    other_adapter: str | None = option(None, "a second saved shadow, for other-draft-head")
    candidate: str = option("speculate", f"what is compared: {', '.join(DRAFTING)}")
    baselines: tuple[str, ...] = option(
        ("attached", "assisted", "base"), f"with what: any of {', '.join((*DRAFTING, *OTHERS))}", words
    )
    task: str | None = option(None, "prompts are this task's test examples; default: random tokens")
    data: str | None = option(None, "directory of local data for the task; default: from the Hub")
    rows: int = option(4, "prompts of each sample", int)
    batch: tuple[int, ...] = option((1,), "prompts that are answered at once, each a case", integers)
    prompt: int = option(64, "tokens of each random prompt", int)
    new: int = option(128, "most tokens of an answer", int)
    bounds = {**Settings.bounds, "rows": (1, None), "prompt": (1, None), "new": (2, None)}
    counts = ("batch",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, candidate=tuple(DRAFTING))


def plan_speculate(settings: SpeculateSettings) -> BenchmarkPlan:
    """Check names, lengths and data; one case for each batch size.

    Raises:
        ShadowtuneError: if a baseline is unknown, or the base or the task's examples cannot be found.
    """
    known = (*DRAFTING, *OTHERS)
    check_known(settings.baselines, known)
    if not settings.baselines or settings.candidate in settings.baselines:
        raise ConfigError(f"--baselines must name others than {settings.candidate}: any of {', '.join(known)}")
    check_length(base_config(settings.model), settings.prompt + settings.new, settings.model)
    if settings.task is not None:
        _task_prompts(settings, 1)
    names = (settings.candidate, *settings.baselines)
    cases = tuple(Case(f"batch={batch}", {"batch": batch}) for batch in settings.batch)
    return BenchmarkPlan({name: {} for name in names}, cases)


def _task_prompts(settings: SpeculateSettings, count: int) -> list[list[int]]:
    data = Dataset.open(DataConfig(task=settings.task, directory=settings.data))
    rows = data.held_out("test", limit=count)
    return [prompt.input_ids for prompt in data.encode_prompts(rows, base_tokenizer(settings.model))]


class SpeculateCandidate(TimedCandidate):
    """A model that answers prompts, with or without drafts."""

    def __init__(self, settings: SpeculateSettings, name: str) -> None:
        super().__init__(settings)
        self.settings, self.name = settings, name
        self.model = self._load()
        self.speculator = Speculator(DRAFTING[name]) if name in DRAFTING else None
        self.options: dict[str, Any] = {"do_sample": False, "max_new_tokens": settings.new, "pad_token_id": 0}
        if name == "assisted":
            self.options["assistant_model"] = self.model.detached().eval()
        self.mark_loaded(self.model)
        self.prepacked = ExitStack()
        self.prepacked.enter_context(prepacked_linear(self.model))  # as CLI and server run it, until this process ends
        self.prompts = self._prompts()
        self.batch, self.next, self.new_tokens = 1, 0, 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up with the first prompts and check the answers; return the peak memory of a step, MB."""
        self.batch, self.next = values["batch"], 0
        if self.name == "assisted" and self.batch > 1:
            raise ShadowtuneError("assisted generation of transformers takes one prompt at a time; leave assisted out")
        if self.speculator is not None:
            self._check()
            self.speculator = Speculator(DRAFTING[self.name])
        peak = self.warm()
        self.facts, self.next = self._facts(), 0
        return peak

    def measure(self) -> float:
        """New tokens per second over the next prompts."""
        self.new_tokens = 0
        seconds = self._time(1)
        self.memory.release()
        return self.new_tokens / seconds

    def _step(self) -> None:
        for inputs in self._next_batches():
            output = self._generate(inputs, self.speculator)
            self.new_tokens += int((output[:, inputs["input_ids"].shape[1] :] != 0).sum())

    def _check(self) -> None:
        """Raise ShadowtuneError if drafting changes an answer; below 32 bits, where ties may, it is allowed."""
        position = self.next
        for inputs in self._next_batches():
            fast, plain = self._generate(inputs, self.speculator), self._generate(inputs, None)
            if not torch.equal(fast, plain) and self.settings.dtype == "float32":
                raise ShadowtuneError(f"{self.name} and plain decoding generate different tokens: {fast} and {plain}")
        self.next = position

    def _generate(self, inputs: Mapping[str, Tensor], speculator: Speculator | None) -> Tensor:
        return self.model.generate(**inputs, **self.options, custom_generate=speculator)

    def _next_batches(self) -> list[dict[str, Tensor]]:
        chosen = [self.prompts[(self.next + index) % len(self.prompts)] for index in range(self.settings.rows)]
        self.next += self.settings.rows
        groups = [chosen[start : start + self.batch] for start in range(0, len(chosen), self.batch)]
        batches = [left_pad(group, self.options["pad_token_id"]) for group in groups]
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]

    def _facts(self) -> dict[str, float | str]:
        if self.speculator is None:
            return {"tokens_per_pass": 1.0, "accepted": ""}
        counts = self.speculator.statistics
        return {
            "tokens_per_pass": counts.tokens_per_pass,
            "accepted": " ".join(f"{s:.2f}" for s in counts.acceptance_rates),
        }

    def _load(self) -> Any:
        settings = self.settings
        torch.manual_seed(0)
        base = load_benchmark_base(settings.model, DTYPES[settings.dtype], self.device)
        if self.name == "base":
            return base.eval()
        if self.name == "lora-merged":
            adapted: Any = METHODS["lora"].build(base, 16)
            return adapted.merge_and_unload().eval()
        adapter = settings.other_adapter if self.name == "other-draft-head" else settings.adapter
        if adapter is None and DRAFTING.get(self.name, SpeculationConfig()).drafter == "draft_head":
            option = "--other-adapter" if self.name == "other-draft-head" else "--adapter"
            raise ShadowtuneError(
                f"{self.name} is measured with an adapter that was trained with draft_rank; pass {option}"
            )
        return load_model(base, adapter)

    def _prompts(self) -> list[list[int]]:
        settings = self.settings
        count = settings.rows * settings.repeats
        if settings.task is not None:
            return _task_prompts(settings, count)
        generator = torch.Generator().manual_seed(0)
        vocabulary = base_config(settings.model).get_text_config(decoder=True).vocab_size
        return torch.randint(3, vocabulary, (count, settings.prompt), generator=generator).tolist()


def load_model(base: PreTrainedModel, adapter: str | None) -> ShadowForCausalLM:
    """Load the adapter with its base; without an adapter, return a perturbed default shadow."""
    if adapter is not None:
        return ShadowForCausalLM.from_pretrained(adapter, base=base)
    build: Callable[..., Any] = METHODS[OURS].build
    model: ShadowForCausalLM = build(base, None).to(base.device)
    perturb(model, torch.float32)
    return model.eval()


SPECULATE = Benchmark(
    name="speculate",
    help="drafts of the shadow against plain decoding: new tokens per second",
    unit="tokens_per_second",
    settings=SpeculateSettings,
    context=("model", "adapter", "task", "device", "dtype", "rows", "prompt", "new"),
    facts=("tokens_per_pass", "accepted"),
    plan=plan_speculate,
    open=SpeculateCandidate,
    examples="""examples:
  python -m benchmarks speculate --model tiny                                  a random base, to see how it works
  python -m benchmarks speculate --adapter runs/gsm8k/model --task gsm8k --data DIR --baselines attached,base,assisted
  python -m benchmarks speculate --adapter runs/gsm8k/model --baselines attached   random prompts: the worst case
  python -m benchmarks speculate --adapter runs/gsm8k/model --task gsm8k --baselines shadow,draft-head,ngram
  python -m benchmarks speculate --adapter runs/layers/model --other-adapter runs/last/model --task gsm8k \\
      --candidate draft-head --baselines other-draft-head,attached
""",
)


PASSES_BASELINES = ("base", "as-usual", "drafting")


@dataclass(frozen=True)
class PassesSettings(Settings):
    """Settings of ``passes``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    adapter: str | None = option(None, "a saved shadow of the base, as RUN/model; default: an untrained one")
    baselines: tuple[str, ...] = option(PASSES_BASELINES, f"with what: any of {', '.join(PASSES_BASELINES)}", words)
    tokens: tuple[int, ...] = option((1, 2, 3, 4, 6, 8, 16, 32), "new tokens of a pass, each a case", integers)
    past: int = option(128, "tokens in the cache before it", int)
    bounds = {**Settings.bounds, "past": (1, None)}
    counts = ("tokens",)


def plan_passes(settings: PassesSettings) -> BenchmarkPlan:
    """Check names and lengths; one case for each number of tokens.

    Raises:
        ShadowtuneError: if a baseline is unknown, or the base cannot be found or is too short.
    """
    check_known(settings.baselines, PASSES_BASELINES)
    if not settings.baselines:
        raise ConfigError(f"--baselines must name some of {', '.join(PASSES_BASELINES)}")
    check_length(base_config(settings.model), settings.past + max(settings.tokens), settings.model)
    cases = tuple(Case(f"tokens={count}", {"tokens": count}) for count in settings.tokens)
    return BenchmarkPlan({name: {} for name in ("attached", *settings.baselines)}, cases)


class PassesCandidate(TimedCandidate):
    """A model that reads a few more tokens, or drafts them, and drops them from the cache again."""

    def __init__(self, settings: PassesSettings, name: str) -> None:
        super().__init__(settings)
        self.name, self.past = name, settings.past
        torch.manual_seed(0)
        self.model = load_model(
            load_benchmark_base(settings.model, DTYPES[settings.dtype], self.device), settings.adapter
        )
        self.model.set_mode("base" if name == "base" else "attached")
        self.drafter = make_drafter(SpeculationConfig(drafter="shadow"), self.model, LogitsProcessorList(), False)
        self.mark_loaded(self.model)
        self.products = ExitStack()
        if name != "as-usual":
            self.products.enter_context(prepacked_linear(self.model))  # until this process ends, as in the server
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.cache: Cache = DynamicCache(config=self.model.config)

    def prepare(self, values: Mapping[str, int]) -> float:
        """Fill the cache and warm up; return the peak memory of a pass, MB."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.model.config.vocab_size, (1, self.past + values["tokens"]), generator=generator)
        past, self.ids = ids.to(self.device).split((self.past, values["tokens"]), 1)
        owner = self.model.base if self.name == "base" else self.model
        self.cache = DynamicCache(config=owner.config)
        self.cache.activate_past_recording()
        self._pass(past)
        for _ in range(PRODUCTS_BEFORE_PACKING + 1):  # weights are packed, as after the first rounds of drafts
            self._pass(past[:, : TRANSPOSED_ROWS.start])
            drop_last(self.cache, min(self.past, TRANSPOSED_ROWS.start))
        return self.warm()

    def measure(self) -> float:
        """New tokens per second."""
        return self.ids.shape[1] * self.steps_per_second()

    def _step(self) -> None:
        count = self.ids.shape[1]
        if self.name == "drafting":
            self.draft(count)
            drop_last(self._shadow_cache(), count)
        else:
            self._pass(self.ids)
            drop_last(self.cache, count)

    def _shadow_cache(self) -> Cache:
        shadow = self.model.shadow.num_cache_layers
        return split_cache(self.cache, shadow, len(self.model.architecture.blocks_of(self.model.base)))[0]

    @torch.no_grad()
    def draft(self, count: int) -> Tensor:
        """Draft ``count`` tokens, (1, count), after the first token of the case."""
        token, drafted = self.ids[:, :1], []
        for position in range(self.past, self.past + count):
            states = self.model.run_backbone(token, None, torch.full_like(token, position), self.cache)
            proposal = self.drafter.propose(list, states[:, -1])
            assert proposal is not None
            token = proposal.tokens[:, None]
            drafted.append(token)
        return torch.cat(drafted, 1)

    @torch.no_grad()
    def _pass(self, ids: Tensor) -> None:
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)


PASSES = Benchmark(
    name="passes",
    help="a pass over a few tokens, and a draft of as many: tokens per second",
    unit="tokens_per_second",
    settings=PassesSettings,
    context=("model", "adapter", "device", "dtype", "past"),
    plan=plan_passes,
    open=PassesCandidate,
    examples="""examples:
  python -m benchmarks passes --model tiny --tokens 1,4       a random base, to see how it works
  python -m benchmarks passes --adapter runs/gsm8k/model
""",
)
