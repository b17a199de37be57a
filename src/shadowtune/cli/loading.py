"""Load what commands are given: a run directory or saved shadow to detach, or several of them as adapters to serve."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from shadowtune.data.dataset import Dataset
    from shadowtune.data.encoding import EncodedPrompt
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.data.sources import Row
    from shadowtune.evaluation.run import FinishedRun
    from shadowtune.export.card import Card
    from shadowtune.model.causal_lm import ShadowForCausalLM
    from shadowtune.model.deferral_files import SavedDeferralHead

ScoreAnswers = Callable[[list[str]], list[float]]
"""From the answers to all held-out prompts to the score of each, between 0 and 1."""


@dataclass
class LoadedRun:
    """A trained shadow with its base, and prompts to check it on."""

    model: Any
    tokenizer: Any
    card: "Card"
    prompt_format: "PromptFormat"
    prompts: list[list[int]] = field(default_factory=list)
    """Held-out prompts as token ids, or built-in ones."""
    score: ScoreAnswers | None = None
    """Scores answers to held-out prompts."""
    deferral_head: "SavedDeferralHead | None" = None
    """For the detached model."""


@dataclass(frozen=True)
class AdapterSource:
    """Facts about the adapter of a run directory or saved shadow, without its weights."""

    path: Path
    model: Path
    """Directory of the shadow's files."""
    base: str | None
    """The base's name; None takes it from the shadow's own config."""
    prompt_format: "PromptFormat"
    loading: dict[str, Any]
    """Keywords that load the base as in training."""


@dataclass
class LoadedAdapters:
    """A base with its shadows by name."""

    base: Any
    tokenizer: Any
    adapters: "dict[str, tuple[ShadowForCausalLM, PromptFormat]]"


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory of ``shadowtune train``."""
    return (path / "config.yaml").is_file()


def load_run(path: Path, limit: int) -> LoadedRun:
    """Load a run, with at most ``limit`` held-out prompts, or a saved shadow, with built-in ones.

    Raises:
        ShadowtuneError: if it is neither, or the run's method has no detached mode.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow")
    from shadowtune.export.deferral import folded_head
    from shadowtune.model.deferral_files import read_deferral_head

    loaded = _load_finished_run(path, limit) if is_run(path) else _load_saved_shadow(path)
    saved = read_deferral_head(path / "model" if is_run(path) else path)
    loaded.deferral_head = folded_head(saved, loaded.model.shadow)
    if not loaded.prompts:
        from shadowtune.export.detaching import built_in_prompts

        loaded.prompts = built_in_prompts(loaded.tokenizer)
    return loaded


def shadow_tokenizer(path: Path, base: str) -> Any:
    """Load the tokenizer saved with a shadow, or that of its base if there is none."""
    from shadowtune.export.exporting import read_tokenizer
    from shadowtune.models import resolve

    own = (path / "tokenizer_config.json").is_file()
    return read_tokenizer(str(path) if own or not base else resolve(base))


def adapter_paths(runs: Sequence[str], named: Sequence[str]) -> dict[str, Path]:
    """Return the paths of adapters by name: those of ``--name NAME=RUN``, the others by their directory's name.

    Raises:
        ConfigError: if two have the same name, or there is none.
    """
    found: dict[str, Path] = {}
    pairs = [(Path(run).absolute().name, run) for run in runs] + [_split_name(text) for text in named]
    for name, run in pairs:
        if name in found:
            raise ConfigError(f"{found[name]} and {run} would both be called {name!r}; write --name OTHER={run}")
        found[name] = Path(run)
    if not found:
        raise ConfigError("name at least one run of shadowtune train, or a saved shadow")
    return found


def load_adapters(paths: Mapping[str, Path], report: Callable[[str], None]) -> LoadedAdapters:
    """Load several shadows on the base of the first one.

    Args:
        paths: run directories or saved shadows, by name.
        report: called with a line for each one.

    Raises:
        ShadowtuneError: if one is neither, cannot generate, or has another base.
    """
    import torch

    sources = {name: read_adapter_source(path) for name, path in paths.items()}
    loaded: LoadedAdapters | None = None
    for number, (name, source) in enumerate(sources.items(), 1):
        report(f"loading {name} from {source.path} ({number} of {len(sources)})")
        if loaded is None:
            model: Any = load_adapter(source)
            if torch.accelerator.is_available():
                model.to(torch.accelerator.current_accelerator())
            tokenizer = shadow_tokenizer(source.model, model.config.base_name_or_path or "")
            loaded = LoadedAdapters(model.base, tokenizer, {})
        else:
            model = load_adapter(source, loaded.base)
        check_finite(name, model)
        loaded.adapters[name] = (model, source.prompt_format)
    assert loaded is not None
    return loaded


def read_adapter_source(path: Path) -> AdapterSource:
    """Read the settings and the prompt format of a run directory or a saved shadow.

    Raises:
        ShadowtuneError: if it is neither, or its model does not generate with a shadow.
    """
    from shadowtune.data.prompt_format import PromptFormat

    if not path.is_dir():
        hint = f"; shadowtune serve edge {path} serves a file" if path.is_file() else ""
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow{hint}")
    if not is_run(path):
        return AdapterSource(path, path, None, PromptFormat.load(path), {})
    import torch

    from shadowtune.evaluation.run import read_run_config, run_dataset
    from shadowtune.model.quantization import quantization_arguments

    config = read_run_config(path)
    if not config.leaves_shadow or config.task != "causal_lm":
        raise ConfigError(f"{path} is a {config.method} {config.task} run; a server needs a shadow that generates")
    if not (path / "model").is_dir():
        raise CheckpointError(f"{path} has no model yet: the run has not finished training")
    dtype = vars(torch)[config.base_dtype]
    loading = {"dtype": dtype, **quantization_arguments(config.base_quantization, dtype)}
    return AdapterSource(path, path / "model", config.model, run_dataset(path, config).prompt_format, loading)


def load_adapter(source: AdapterSource, base: Any = None) -> "ShadowForCausalLM":
    """Load a shadow on a loaded base, or with its own.

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


def check_finite(name: str, model: "ShadowForCausalLM") -> None:
    """Refuse a shadow with NaN or infinite weights.

    Raises:
        CheckpointError: naming the shadow and the first such tensor.
    """
    for parameter, weight in model.shadow.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{name!r} has weights that are NaN or infinite ({parameter}); load an earlier checkpoint"
            )


def _split_name(text: str) -> tuple[str, str]:
    name, separator, run = text.partition("=")
    if not (name and separator and run):
        raise ConfigError(f"--name takes NAME=RUN, got {text!r}")
    return name, run


def _load_finished_run(path: Path, limit: int) -> LoadedRun:
    from shadowtune.evaluation.run import FinishedRun, read_run_config

    config = read_run_config(path)
    if config.method != "shadow":
        raise ConfigError(f"{path} is a {config.method} run; only the shadow method leaves a model that runs alone")
    finished = FinishedRun.open(path)
    prompts, score = _held_out_prompts(finished, limit)
    return LoadedRun(finished.model, finished.tokenizer, _card(finished), finished.prompt_format, prompts, score)


def _load_saved_shadow(path: Path) -> LoadedRun:
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.export.card import Card
    from shadowtune.model.loading import read_config
    from shadowtune.model.methods import SHADOW_CLASSES

    config = read_config(str(path))
    classifies = any("SequenceClassification" in name for name in config.architectures or [])
    task = "classification" if classifies else "causal_lm"
    model = SHADOW_CLASSES[task].from_pretrained(str(path))
    base = config.base_name_or_path or ""
    return LoadedRun(model, shadow_tokenizer(path, base), Card(base, task), PromptFormat.load(path))


def _held_out_prompts(finished: "FinishedRun", limit: int) -> tuple[list[list[int]], ScoreAnswers | None]:
    """Return prompts of the run's test examples, else of its validation examples, and the score of answers to them."""
    data, tokenizer = finished.dataset, finished.tokenizer
    sources: tuple[Callable[[], list[Row] | None], ...] = (
        lambda: data.held_out("test", limit=limit),
        lambda: data.held_out(data.settings.validation_split, limit=limit),
        data.validation_rows,
    )
    for load in sources:
        try:
            rows = (load() or [])[:limit]
            if finished.config.task == "classification":
                encoded = data.encode(rows, tokenizer, classify=True)[0]
                prompts, score = [row["input_ids"] for row in encoded], None
            else:
                answerable = data.encode_prompts(rows, tokenizer)
                prompts, score = [prompt.input_ids for prompt in answerable], _scoring(data, rows, answerable)
        except DataError:  # no such split, moved, or plain text: another source, in the end the built-in prompts
            continue
        if prompts:
            return prompts, score
    return [], None


def _scoring(data: "Dataset", rows: "list[Row]", prompts: "list[EncodedPrompt]") -> ScoreAnswers:
    from shadowtune.evaluation.scoring import score_answers

    references = data.references(rows, prompts)
    return lambda answers: score_answers(data.metric, answers, references)[0]


def _card(finished: "FinishedRun") -> "Card":
    from shadowtune.export.card import Card, measured_accuracy, measuring_conditions, training_costs, training_facts

    config, path = finished.config, finished.path
    measured: dict[str, str] = {}  # from evaluation-MODE-ROWS.json
    for file in sorted(path.glob("evaluation-*.json")):
        measured |= measured_accuracy(file.stem.split("-")[1], file.read_text())
    conditions = ""
    try:
        measured |= training_costs(json.loads((path / "summary.json").read_text()))
        conditions = measuring_conditions(json.loads((path / "environment.json").read_text()))
    except (OSError, ValueError):  # a run of an earlier version, or one that was edited
        pass
    return Card(config.model, config.task, training_facts(config), measured, conditions)
