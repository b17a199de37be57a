"""``bench decode``: greedy ``generate`` with a cache, in new tokens per second, the prompt's own pass included.

Each package generates as its users call it: one without a cache does without. Adapters are not at their start, where
some would do nothing. The subjects that end in "-compiled" keep a static cache and compile the step of one token.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import CompileConfig

from shadowtune.benchmark.bases import MODEL_HELP, base_config, check_length
from shadowtune.benchmark.bench import Bench, Case, Plan, Settings, integers, option, words
from shadowtune.benchmark.peers import CONTENDERS, OURS, check_peers, equal_budgets
from shadowtune.benchmark.subject import ModelSubject
from shadowtune.benchmark.timing import DTYPES
from shadowtune.config.checking import check_choices
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.modeling import Mode

NOISE = 0.01
"""Standard deviation of what is added to every trained parameter."""


@dataclass(frozen=True)
class Decoder:
    """A contender, and how it generates."""

    contender: str
    mode: Mode = "attached"
    """Of ours."""
    compiled: bool = False


DECODERS: dict[str, Decoder] = {
    **{name: Decoder(name) for name in CONTENDERS},
    "shadow-detached": Decoder(OURS, mode="detached"),
    "shadow-compiled": Decoder(OURS, compiled=True),
    "lora-compiled": Decoder("lora", compiled=True),
    "base-compiled": Decoder("base", compiled=True),
}
"""What can be measured, by name."""
SUBJECTS = tuple(name for name, decoder in DECODERS.items() if decoder.contender == OURS)


class CompiledEverywhere(CompileConfig):
    """Has ``generate`` compile on a CPU too, where it does not by itself; a graph for each shape of batch."""

    _compile_all_devices = True  # type: ignore[assignment] # transformers' own switch, untyped

    def __init__(self) -> None:
        super().__init__(fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """Settings of ``bench decode``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    subject: str = option(OURS, f"what is compared: {', '.join(SUBJECTS)}")
    peers: tuple[str, ...] = option(
        ("base", "lora", "peft-shadow", "shadow-peft"), f"with what: any of {', '.join(DECODERS)}", words
    )
    batch: tuple[int, ...] = option((1, 8), "rows that are generated at once, each a case", integers)
    prompt: int = option(64, "tokens of each prompt", int)
    new: int = option(128, "tokens generated for each row", int)
    parameters: int | None = option(None, "trained parameters of each; default: those of the default shadow", int)
    adapter_dtype: str = option("float32", "precision of the trained parameters: float32 or bfloat16")
    bounds = {**Settings.bounds, "prompt": (1, None), "new": (2, None), "parameters": (1, None)}
    counts = ("batch",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, subject=SUBJECTS, adapter_dtype=tuple(DTYPES))


def plan(settings: DecodeSettings) -> Plan:
    """Choose sizes that make the budgets equal; a case for each number of rows.

    Raises:
        ShadowtuneError: one of its kinds, if a peer is unknown or not installed, the base cannot be found or is too
            short, or there are no equal budgets.
    """
    check_peers(settings.peers, {name: CONTENDERS[decoder.contender] for name, decoder in DECODERS.items()})
    if settings.subject in settings.peers:
        raise ConfigError(f"{settings.subject} is compared with itself; leave it out of --peers")
    config = base_config(settings.model)
    check_length(config, settings.prompt + settings.new, settings.model)
    names = (settings.subject, *settings.peers)
    sizes = equal_budgets(config, [DECODERS[name].contender for name in names], settings.parameters)
    subjects = {name: {"size": sizes[DECODERS[name].contender]} for name in names}
    return Plan(subjects, tuple(Case(f"batch={batch}", {"batch": batch}) for batch in settings.batch))


class DecodeSubject(ModelSubject):
    """A model that generates from random prompts."""

    def __init__(self, settings: DecodeSettings, name: str, size: int | None) -> None:
        super().__init__(settings)
        decoder = DECODERS[name]
        self.settings, self.name = settings, name
        self.load(settings.model, CONTENDERS[decoder.contender], size)
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
        self.mark_loaded(self.model)  # what the first call builds, compiled code above all, is not a step's
        return self.warm()

    def measure(self) -> float:
        """New tokens per second, of all rows together."""
        return len(self.prompts["input_ids"]) * self.settings.new * self.steps_per_second()

    def generate(self) -> torch.Tensor:
        """Return the prompts and what follows them, (batch, prompt + new)."""
        return cast(Any, self.model).generate(**self.prompts, **self.options)

    def _step(self) -> None:
        length = self.generate().shape[1] - self.settings.prompt
        if length != self.settings.new:
            raise ShadowtuneError(f"{self.name} generated {length} tokens, not {self.settings.new}; leave it out")


@torch.no_grad()
def perturb(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring every trained parameter to ``dtype`` and add a little noise to it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter + NOISE * torch.randn_like(parameter)).to(dtype)


def open_subject(settings: DecodeSettings, name: str, **arguments: Any) -> DecodeSubject:
    """Load a subject of ``bench decode``."""
    return DecodeSubject(settings, name, **arguments)


DECODE = Bench(
    name="decode",
    help="greedy generation with a cache: new tokens per second",
    unit="tokens_per_second",
    settings=DecodeSettings,
    context=("model", "device", "dtype", "adapter_dtype", "prompt", "new", "warm_up"),
    plan=plan,
    open=open_subject,
    examples="""examples:
  shadowtune bench decode --model tiny           under a minute: a random base, to see how it works
  shadowtune bench decode --subject shadow-compiled --peers base,base-compiled,shadow --batch 1
  shadowtune bench decode --model path/or/hub-id --device cuda --dtype bfloat16 --adapter-dtype bfloat16
""",
)
