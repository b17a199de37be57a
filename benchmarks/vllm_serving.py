"""Benchmark ``vllm``: the attached model in vLLM, beside its bare base there and our own engine, in new tokens/second.

The environment variable VLLM_PYTHON names an interpreter with vLLM and the plugin (docs/vllm.md). Prompts are random
tokens and all answers have the same length. The prefill is included; prefix caching, drafts and HTTP are not. "vllm"
and "engine" run the same shadow. Memory is not comparable: vLLM allocates its key-value cache when it loads.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bases import MODEL_HELP, base_config, check_length, load_benchmark_base
from benchmarks.benchmark import (
    Benchmark,
    BenchmarkPlan,
    Candidate,
    Case,
    Settings,
    check_known,
    integers,
    option,
    words,
)
from benchmarks.measurement import DTYPES, TimedCandidate, perturb
from benchmarks.methods import METHODS, OURS
from benchmarks.serving import ServingCandidate
from shadowtune.config.settings import check_choices
from shadowtune.errors import ConfigError, ShadowtuneError

PYTHON = "VLLM_PYTHON"
WORKER = Path(__file__).parent / "vllm_worker.py"
ATTACHED, BASE, ENGINE = "vllm", "vllm-base", "engine"


@dataclass(frozen=True)
class VllmSettings(Settings):
    """Settings of ``vllm``."""

    model: str = option("smollm2-135m", MODEL_HELP)
    baselines: tuple[str, ...] = option((BASE, ENGINE), f"with what: any of {BASE}, {ENGINE}", words)
    streams: tuple[int, ...] = option((1, 16, 64), "requests at once, each a case", integers)
    prompt: int = option(32, "tokens of each prompt", int)
    new: int = option(32, "tokens of each answer", int)
    mode: str = option("compiled", "how vLLM runs: compiled, or eager")
    bounds = {**Settings.bounds, "prompt": (1, None), "new": (1, None)}
    counts = ("streams",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_choices(self, mode=("compiled", "eager"))


def plan_vllm(settings: VllmSettings) -> BenchmarkPlan:
    """Check names and lengths; one case for each number of streams.

    Raises:
        ConfigError: if a baseline is unknown, the base has too few positions, or VLLM_PYTHON is not set.
    """
    check_known(settings.baselines, (BASE, ENGINE))
    check_length(base_config(settings.model), settings.prompt + settings.new, settings.model)
    if not os.environ.get(PYTHON):
        raise ConfigError(f"{PYTHON} names no interpreter with vLLM; `make vllm` makes one, .venv-vllm/bin/python")
    cases = tuple(Case(f"streams={streams}", {"streams": streams}) for streams in settings.streams)
    return BenchmarkPlan({name: {} for name in (ATTACHED, *settings.baselines)}, cases)


class VllmCandidate(TimedCandidate):
    """A model in vLLM, in a process of its interpreter."""

    def __init__(self, settings: VllmSettings, name: str) -> None:
        super().__init__(settings)
        self.settings, self.streams, self.peak_mb = settings, 1, 0.0
        self.directory = tempfile.TemporaryDirectory(prefix="benchmark-vllm-")
        model, vocabulary = self._save(Path(self.directory.name), name == ATTACHED)
        prompts = torch.randint(3, vocabulary, (max(settings.streams), settings.prompt)).tolist()
        engine = {
            "dtype": settings.dtype,
            "enable_prefix_caching": False,
            "enforce_eager": settings.mode == "eager",
            "max_model_len": settings.prompt + settings.new,
            "max_num_seqs": max(settings.streams),
            "skip_tokenizer_init": True,
        }
        self.process = subprocess.Popen(
            [os.environ[PYTHON], str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask({"model": str(model), "engine": engine, "prompts": prompts, "new": settings.new})

    def _save(self, directory: Path, attached: bool) -> tuple[Path, int]:
        """Save what vLLM loads; return its directory and the size of the vocabulary."""
        torch.manual_seed(0)
        base = load_benchmark_base(self.settings.model, DTYPES[self.settings.dtype], self.device)
        base.save_pretrained(directory / "base")
        base.config.name_or_path = base.name_or_path = str(directory / "base")
        vocabulary = base.config.get_text_config(decoder=True).vocab_size
        if not attached:
            return directory / "base", vocabulary
        model: Any = METHODS[OURS].build(base, None)
        perturb(model, torch.float32)
        model.save_pretrained(directory / "shadow")
        self.mark_loaded(nn.Module())
        return directory / "shadow", vocabulary

    def prepare(self, values: Mapping[str, Any]) -> float:
        """Warm up with so many streams; return the peak memory of vLLM above the loaded model, MB."""
        self.streams = values["streams"]
        self.warm()
        return self.peak_mb

    def measure(self) -> float:
        """New tokens per second of all streams."""
        return self.steps_per_second() * self.streams * self.settings.new

    def _step(self) -> None:
        reply = self._ask(self.streams)
        self.peak_mb = reply["peak_mb"]
        if reply["tokens"] != self.streams * self.settings.new:
            raise ShadowtuneError(
                f"vLLM answered with {reply['tokens']} tokens, not {self.settings.new} in each stream"
            )

    def _ask(self, line: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which reading finds
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise ShadowtuneError(f"vLLM ended with exit code {self.process.wait()}; run {WORKER} by hand to see why")
        return dict(json.loads(reply))


def open_vllm(settings: VllmSettings, name: str) -> Candidate:
    """Return a loaded candidate: a model in vLLM, or our engine with the streams of one adapter in a batch."""
    return ServingCandidate(settings, "batched") if name == ENGINE else VllmCandidate(settings, name)


VLLM = Benchmark(
    name="vllm",
    help="the attached model in vLLM, beside its base there and our engine: new tokens per second",
    unit="tokens_per_second",
    settings=VllmSettings,
    context=("model", "device", "dtype", "prompt", "new", "mode"),
    plan=plan_vllm,
    open=open_vllm,
    examples="""examples:
  VLLM_PYTHON=.venv-vllm/bin/python python -m benchmarks vllm
  VLLM_PYTHON=.venv-vllm/bin/python python -m benchmarks vllm --streams 16 --mode eager --baselines engine
""",
)
