"""Benchmark ``detached``: the detached shadow in every export format, against the attached model and the base.

Each candidate continues one prompt greedily behind the same small interface; runtime and weight format differ. The
files are written anew by the writers of ``shadowtune export``, from a saved shadow or from an untrained one: neither
speed nor size depends on training.

Facts of a candidate: ``disk_mb``, in 10^6 bytes as file systems count, of its file or directory, tokenizer included
(for the attached model and the base, which are in no file of their own, of their weights); ``model_mb``, what opening
and running it once adds to the resident memory of a process that has loaded torch.
"""

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from benchmarks.bases import MODEL_HELP, base_config, base_tokenizer, check_length, load_benchmark_base
from benchmarks.benchmark import Benchmark, BenchmarkPlan, Case, Settings, check_known, option, words
from benchmarks.measurement import DTYPES, TimedCandidate, perturb
from benchmarks.methods import METHODS
from benchmarks.methods import OURS as SHADOW
from shadowtune.config.settings import check_choices
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.export.exporting import FORMATS, check_export, read_plain
from shadowtune.export.runtimes import Runtime, TorchModel
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.detached import write_plain

OURS = "detached"
EXPORTS: dict[str, tuple[str, str]] = {
    OURS: ("safetensors", "f32"),
    **{f"{to}-{quantization}": (to, quantization) for to in FORMATS for quantization in FORMATS[to].quantizations},
}
"""Format and quantization of every detached candidate, by name."""
MODELS = ("attached", "base")
"""The baselines that are no detached shadow."""
BASELINES = (
    *MODELS,
    "safetensors-f16",
    "safetensors-int8",
    "gguf-f16",
    "gguf-q8_0",
    "gguf-q4_0",
    "onnx-f32",
    "onnx-int8",
    "onnx-int4",
)
PREFILL = "prefill"
PHASES = (PREFILL, "decode")


@dataclass(frozen=True)
class DetachedSettings(Settings):
    """Settings of ``detached``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    adapter: str | None = option(None, "a saved shadow of the base, as RUN/model; default: an untrained one")
    candidate: str = option(OURS, f"what is compared: {', '.join(EXPORTS)}")
    baselines: tuple[str, ...] = option(BASELINES, f"with what: any of {', '.join((*MODELS, *EXPORTS))}", words)
    phases: tuple[str, ...] = option(
        PHASES, "each a case: prefill reads the prompt and chooses a token, decode goes on from there", words
    )
    prompt: int = option(256, "tokens of the prompt", int)
    new: int = option(64, "tokens that decode continues it by", int)
    bounds = {**Settings.bounds, "prompt": (1, None), "new": (2, None)}

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, candidate=tuple(EXPORTS))
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise ConfigError(f"phases must be some of {', '.join(PHASES)}, got {', '.join(self.phases) or 'none'}")
        if self.device != "cpu":
            raise ConfigError(f"exported files run on the processor, not on {self.device}; leave --device out")


def plan_detached(settings: DetachedSettings) -> BenchmarkPlan:
    """Check that every candidate can be written and run; one case for each phase.

    Raises:
        ShadowtuneError: if a baseline is unknown or a package for it is missing, or the base cannot be
            found or is too short.
    """
    if not settings.baselines:
        raise ConfigError(f"no baseline to compare with; choose from {', '.join((*MODELS, *EXPORTS))}")
    if settings.candidate in settings.baselines:
        raise ConfigError(f"{settings.candidate} is compared with itself; leave it out of --baselines")
    names = (settings.candidate, *settings.baselines)
    for name in names:
        _check_candidate(name)
    check_length(base_config(settings.model), settings.prompt + settings.new, settings.model)
    return BenchmarkPlan(
        {name: {} for name in names}, tuple(Case(phase, {"phase": phase}) for phase in settings.phases)
    )


def _check_candidate(name: str) -> None:
    if name in MODELS:
        return
    check_known([name], (*MODELS, *EXPORTS))
    to, quantization = EXPORTS[name]
    check_export(to, quantization)
    if to == "gguf" and importlib.util.find_spec("xllamacpp") is None:  # else torch would run it, and be measured
        raise ShadowtuneError(
            f"{name} runs in llama.cpp by xllamacpp, which is not installed; leave it out of --baselines"
        )


class DetachedCandidate(TimedCandidate):
    """A model in one runtime, which continues a prompt."""

    def __init__(self, settings: DetachedSettings, name: str) -> None:
        super().__init__(settings)
        self.settings, self.name = settings, name
        vocabulary = base_config(settings.model).get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompt: list[int] = torch.randint(vocabulary, (settings.prompt,), generator=generator).tolist()
        self.new = 1
        self.prefill_seconds = 0.0
        with tempfile.TemporaryDirectory() as scratch:  # open files stay readable after their deletion
            file = None if name in MODELS else write_export(settings, name, Path(scratch))
            self.memory.restart()
            self.empty_mb = self.memory.current_mb()
            if file is None:
                model: PreTrainedModel = make_shadow(settings) if name == "attached" else _base(settings)
                self.disk_mb = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e6
                self.runtime: Runtime = TorchModel(model)
            else:
                self.disk_mb = sum(one.stat().st_size for one in (file, *file.glob("*")) if one.is_file()) / 1e6
                self.runtime = FORMATS[EXPORTS[name][0]].open(file, settings.prompt + settings.new)

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Run once, which allocates what is kept, and warm up; return the peak memory of a run above that, MB."""
        self.new = 1 if values["phase"] == PREFILL else self.settings.new
        self._step()
        self.memory.restart()
        self.loaded_mb = self.memory.current_mb()
        self.facts = {"disk_mb": self.disk_mb, "model_mb": self.loaded_mb - self.empty_mb}
        return self.warm()

    def measure(self) -> float:
        """Tokens per second: those of the prompt, or the new ones after the first, which comes with the prompt."""
        self._time(self.warm_up)
        self.prefill_seconds = 0.0
        seconds = self._time(self.steps)
        self.memory.release()
        if self.new == 1:
            return self.steps * len(self.prompt) / seconds
        return self.steps * (self.new - 1) / (seconds - self.prefill_seconds)

    def _step(self) -> None:
        tokens = self.runtime.generate(self.prompt, self.new)
        if len(tokens) != self.new:
            raise ShadowtuneError(f"{self.name} generated {len(tokens)} tokens, not {self.new}; leave it out")
        self.prefill_seconds += self.runtime.prompt_seconds


def make_shadow(settings: DetachedSettings) -> ShadowForCausalLM:
    """Load the shadow with its base; without an adapter, make a perturbed default shadow."""
    base = _base(settings)
    if settings.adapter is not None:
        return ShadowForCausalLM.from_pretrained(settings.adapter, base=base)
    model = cast(ShadowForCausalLM, METHODS[SHADOW].build(base, None))
    perturb(model, torch.float32)
    return model


def write_export(settings: DetachedSettings, name: str, directory: Path) -> Path:
    """Export the shadow in the format of a candidate; return the new file or directory, below ``directory``.

    Raises:
        ShadowtuneError: if the shadow cannot be loaded, has no plain form, or the format cannot express it.
    """
    to, quantization = EXPORTS[name]
    kind, plain, target = FORMATS[to], directory / "plain", directory / name
    write_plain(make_shadow(settings).detached(), plain)
    base_tokenizer(settings.model).save_pretrained(str(plain))
    model, tokenizer = read_plain(plain)
    if not kind.single_file:
        target.mkdir()
    kind.write(model, tokenizer, target, quantization, PromptFormat())
    return target


def _base(settings: DetachedSettings) -> PreTrainedModel:
    torch.manual_seed(0)  # every candidate has the same random base, and the same shadow beside it
    return load_benchmark_base(settings.model, DTYPES[settings.dtype], torch.device(settings.device))


DETACHED = Benchmark(
    name="detached",
    help="the shadow alone in each exported format: speed, memory, size on disk",
    unit="tokens_per_second",
    settings=DetachedSettings,
    context=("model", "adapter", "device", "dtype", "prompt", "new", "warm_up"),
    facts=("disk_mb", "model_mb"),
    plan=plan_detached,
    open=DetachedCandidate,
    examples="""examples:
  python -m benchmarks detached --model tiny                                    a random base, to see how it works
  python -m benchmarks detached --candidate onnx-int8 --baselines attached,base       what a phone would run
  python -m benchmarks detached --model smollm2-135m --adapter runs/clinc150/model

the files themselves, of a model that you train:
  shadowtune train configs/clinc150.yaml                                    -> runs/clinc150
  shadowtune detach runs/clinc150 --out clinc150-small                      -> a plain transformers model
  shadowtune export clinc150-small --to gguf --quant q8_0                   -> clinc150-small-q8_0.gguf
""",
)
