"""Runs and saved shadows opened for one engine: all on the same base, which is loaded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.trained import is_run, shadow_tokenizer
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.model.causal_lm import ShadowForCausalLM

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What a directory says of its shadow."""

    path: Path
    model: Path
    """Where the shadow's files are."""
    base: str | None
    """The base's name; None lets the shadow's own config say it."""
    prompt_format: "PromptFormat"
    loading: dict[str, Any]
    """Keywords that load the base as in training."""


@dataclass
class Served:
    """A base with its shadows by name."""

    base: Any
    tokenizer: Any
    adapters: "dict[str, tuple[ShadowForCausalLM, PromptFormat]]"


def named_runs(runs: Sequence[str], named: Sequence[str]) -> dict[str, Path]:
    """Return runs by the names they are asked for by: those of ``--name NAME=RUN``, the others their directory's.

    Raises:
        ConfigError: if two have the same name, or there is none.
    """
    found: dict[str, Path] = {}
    pairs = [(Path(run).absolute().name, run) for run in runs] + [_pair(text) for text in named]
    for name, run in pairs:
        if name in found:
            raise ConfigError(f"{found[name]} and {run} would both be called {name!r}; write --name OTHER={run}")
        found[name] = Path(run)
    if not found:
        raise ConfigError("name at least one run of shadowtune train, or a saved shadow")
    return found


def _pair(text: str) -> tuple[str, str]:
    name, separator, run = text.partition("=")
    if not (name and separator and run):
        raise ConfigError(f"--name takes NAME=RUN, got {text!r}")
    return name, run


def open_served(runs: Mapping[str, Path], progress: Say) -> Served:
    """Load all shadows over the base of the first one.

    Args:
        runs: run directories or saved shadows, by name.
        progress: told what is being loaded.

    Raises:
        ShadowtuneError: if one is neither, cannot generate, or has another base.
    """
    import torch

    sources = {name: read_source(path) for name, path in runs.items()}
    served: Served | None = None
    for number, (name, source) in enumerate(sources.items(), 1):
        progress(f"loading {name} from {source.path} ({number} of {len(sources)})")
        if served is None:
            model: Any = open_shadow(source)
            if torch.cuda.is_available():
                model.to("cuda")
            tokenizer = shadow_tokenizer(source.model, model.config.base_name_or_path or "")
            served = Served(model.base, tokenizer, {})
        else:
            model = open_shadow(source, served.base)
        check_finite(name, model)
        served.adapters[name] = (model, source.prompt_format)
    assert served is not None
    return served


def check_finite(name: str, model: "ShadowForCausalLM") -> None:
    """Refuse a shadow whose weights are not numbers.

    Raises:
        CheckpointError: naming the shadow and the first such tensor.
    """
    for part, weight in model.shadow.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{name!r} has weights that are NaN or infinite ({part}); load an earlier checkpoint")


def read_source(path: Path) -> Source:
    """Read what a run directory or a saved shadow says, without its weights.

    Raises:
        ShadowtuneError: if it is neither, or its model does not generate with a shadow.
    """
    from shadowtune.data.prompt_format import PromptFormat

    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow")
    if not is_run(path):
        return Source(path, path, None, PromptFormat.load(path), {})
    return _read_run(path)


def _read_run(path: Path) -> Source:
    import torch

    from shadowtune.evaluation.run import read_run_config, run_dataset
    from shadowtune.model.methods import quantization_arguments

    config = read_run_config(path)
    if not config.leaves_shadow or config.task != "causal_lm":
        raise ConfigError(f"{path} is a {config.method} {config.task} run; a server needs a shadow that generates")
    if not (path / "model").is_dir():
        raise CheckpointError(f"{path} has no model yet: the run has not finished training")
    dtype = vars(torch)[config.base_dtype]
    loading = {"dtype": dtype, **quantization_arguments(config.base_quantization, dtype)}
    return Source(path, path / "model", config.model, run_dataset(path, config).prompt_format, loading)


def open_shadow(source: Source, base: Any = None) -> "ShadowForCausalLM":
    """Load a shadow over a base that is loaded already, or with its own.

    Raises:
        CheckpointError: if files are missing or damaged, or the base is another one.
    """
    from shadowtune.model.causal_lm import ShadowForCausalLM
    from shadowtune.models import resolve

    if base is not None:
        model = ShadowForCausalLM.from_pretrained(str(source.model), base=base)
    else:
        own = None if source.base is None else resolve(source.base)
        model = ShadowForCausalLM.from_pretrained(str(source.model), base=own, **source.loading)
    assert isinstance(model, ShadowForCausalLM)
    return model
