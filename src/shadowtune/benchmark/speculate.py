"""``bench speculate``: greedy decoding with drafts and without, in new tokens per second, prompts' passes included.

Prompts are a task's test rows, others in each round and the same for every subject; without a task, random tokens, of
which no shadow knows anything. An answer ends where the model ends it, and rows are answered alone or in batches. A
subject that drafts first shows that it says what plain decoding says.

Facts: ``tokens_per_pass``, what a pass of the attached model gave; ``stood``, by place in the draft the
share of the tokens that stood where they were judged.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowtune.benchmark.bases import MODEL_HELP, base_config, base_tokenizer, check_length, real_base
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, check_known, integers, option, words
from shadowtune.benchmark.decode import perturb
from shadowtune.benchmark.peers import CONTENDERS, OURS
from shadowtune.benchmark.timing import DTYPES, TimedSubject
from shadowtune.config.checking import check_choices
from shadowtune.config.data import DataConfig
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.collate import left_pad
from shadowtune.data.dataset import Dataset
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.speculation.decoding import Speculator

DRAFTING: dict[str, SpeculationConfig] = {
    "speculate": SpeculationConfig(),
    **{f"speculate-{length}": SpeculationConfig(length=length) for length in (1, 2, 3, 4, 6, 8)},
    "shadow": SpeculationConfig(drafter="shadow"),
    "shadow-all-tokens": SpeculationConfig(drafter="shadow", draft_vocabulary=False),
    "feedback": SpeculationConfig(drafter="feedback"),
    "ngram": SpeculationConfig(drafter="ngram"),
}
"""Subjects that draft, and how."""
OTHERS = ("attached", "assisted", "base", "lora-merged")
"""Plain decoding; transformers' assisted generation by the detached model; the bare base; one with LoRA merged in."""


@dataclass(frozen=True)
class SpeculateSettings(Settings):
    """Settings of ``bench speculate``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    adapter: str | None = option(None, "a saved shadow of the base, as RUN/model; default: an untrained one")
    subject: str = option("speculate", f"what is compared: {', '.join(DRAFTING)}")
    peers: tuple[str, ...] = option(
        ("attached", "assisted", "base"), f"with what: any of {', '.join((*DRAFTING, *OTHERS))}", words
    )
    task: str | None = option(None, "prompts are this task's test rows; default: random tokens")
    data: str | None = option(None, "directory of local data for the task; default: from the Hub")
    rows: int = option(4, "prompts of each sample", int)
    batch: tuple[int, ...] = option((1,), "rows that are answered at once, each a case", integers)
    prompt: int = option(64, "tokens of each random prompt", int)
    new: int = option(128, "most tokens of an answer", int)
    bounds = {**Settings.bounds, "rows": (1, None), "prompt": (1, None), "new": (2, None)}
    counts = ("batch",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, subject=tuple(DRAFTING))


def plan(settings: SpeculateSettings) -> Plan:
    """Check that all is known and there; a case for each number of rows answered at once.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown, or the base or the task's rows cannot be found.
    """
    known = (*DRAFTING, *OTHERS)
    check_known(settings.peers, known)
    if not settings.peers or settings.subject in settings.peers:
        raise ConfigError(f"--peers must name others than {settings.subject}: any of {', '.join(known)}")
    check_length(base_config(settings.model), settings.prompt + settings.new, settings.model)
    if settings.task is not None:
        _task_prompts(settings, 1)
    names = (settings.subject, *settings.peers)
    return Plan({name: {} for name in names}, tuple(Case(f"batch={b}", {"batch": b}) for b in settings.batch))


def _task_prompts(settings: SpeculateSettings, count: int) -> list[list[int]]:
    data = Dataset.open(DataConfig(task=settings.task, directory=settings.data))
    rows = data.held_out("test", limit=count)
    return [prompt.input_ids for prompt in data.encode_prompts(rows, base_tokenizer(settings.model))]


class SpeculateSubject(TimedSubject):
    """A model that answers prompts."""

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
        if isinstance(self.model, ShadowForCausalLM):  # as the CLI and the server run it, until this process ends
            self.prepacked.enter_context(prepacked_linear(self.model))
        self.prompts = self._prompts()
        self.batch, self.next, self.new_tokens = 1, 0, 0

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up with the first prompts, and compare what is said; return the peak memory of a step, MB."""
        self.batch, self.next = values["batch"], 0
        if self.name == "assisted" and self.batch > 1:
            raise ShadowtuneError("assisted generation of transformers takes one row at a time; leave assisted out")
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
        self.memory.give_back()
        return self.new_tokens / seconds

    def _step(self) -> None:
        for inputs in self._next_batches():
            output = self._generate(inputs, self.speculator)
            self.new_tokens += int((output[:, inputs["input_ids"].shape[1] :] != 0).sum())

    def _check(self) -> None:
        """Raise ShadowtuneError if drafting changes an answer, but for ties in less than 32 bits."""
        place = self.next
        for inputs in self._next_batches():
            fast, plain = self._generate(inputs, self.speculator), self._generate(inputs, None)
            if not torch.equal(fast, plain) and self.settings.dtype == "float32":
                raise ShadowtuneError(f"{self.name} and plain decoding say different things: {fast} and {plain}")
        self.next = place

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
            return {"tokens_per_pass": 1.0, "stood": ""}
        counts = self.speculator.statistics
        return {
            "tokens_per_pass": counts.tokens_per_pass,
            "stood": " ".join(f"{s:.2f}" for s in counts.acceptance_rates),
        }

    def _load(self) -> Any:
        settings = self.settings
        torch.manual_seed(0)
        base = real_base(settings.model, DTYPES[settings.dtype], self.device)
        if self.name == "base":
            return base.eval()
        if self.name == "lora-merged":
            adapted: Any = CONTENDERS["lora"].build(base, 16)
            return adapted.merge_and_unload().eval()
        if settings.adapter is None and DRAFTING.get(self.name, SpeculationConfig()).drafter == "feedback":
            raise ShadowtuneError(
                "feedback is measured with an adapter that was trained with draft_rank; pass --adapter"
            )
        return load_model(base, settings.adapter)

    def _prompts(self) -> list[list[int]]:
        settings = self.settings
        count = settings.rows * settings.repeats
        if settings.task is not None:
            return _task_prompts(settings, count)
        generator = torch.Generator().manual_seed(0)
        vocabulary = base_config(settings.model).get_text_config(decoder=True).vocab_size
        return torch.randint(3, vocabulary, (count, settings.prompt), generator=generator).tolist()


def load_model(base: PreTrainedModel, adapter: str | None) -> ShadowForCausalLM:
    """Return the adapter beside its base, or without an adapter a shadow that is not at its start."""
    if adapter is not None:
        return ShadowForCausalLM.from_pretrained(adapter, base=base)
    build: Callable[..., Any] = CONTENDERS[OURS].build
    model: ShadowForCausalLM = build(base, None).to(base.device)
    perturb(model, torch.float32)
    return model.eval()


def open_subject(settings: SpeculateSettings, name: str) -> SpeculateSubject:
    """Load a subject of ``bench speculate``."""
    return SpeculateSubject(settings, name)


SPECULATE = Bench(
    name="speculate",
    help="drafts of the shadow against plain decoding: new tokens per second",
    unit="tokens_per_second",
    settings=SpeculateSettings,
    context=("model", "adapter", "task", "device", "dtype", "rows", "prompt", "new"),
    facts=("tokens_per_pass", "stood"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench speculate --model tiny                                  a random base, to see how it works
  shadowtune bench speculate --adapter runs/gsm8k/model --task gsm8k --data DIR --peers attached,base,assisted
  shadowtune bench speculate --adapter runs/gsm8k/model --peers attached   random prompts: the worst case
  shadowtune bench speculate --adapter runs/gsm8k/model --task gsm8k --peers shadow,feedback,ngram
""",
)
