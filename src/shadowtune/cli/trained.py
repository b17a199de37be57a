"""What ``detach`` and ``export`` read: a run directory, or a shadow saved by itself, with prompts to check it on."""

from collections.abc import Callable
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

Score = Callable[[list[str]], list[float]]
"""From the answers to all held-out prompts to the score of each, between 0 and 1."""


@dataclass
class Trained:
    """A trained shadow, opened."""

    model: Any
    tokenizer: Any
    card: "Card"
    prompt_format: "PromptFormat"
    prompts: list[list[int]] = field(default_factory=list)
    """Held-out prompts as token ids, or built-in ones."""
    score: Score | None = None
    """Scores answers to held-out prompts."""


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory of ``shadowtune train``."""
    return (path / "config.yaml").is_file()


def open_trained(path: Path, limit: int) -> Trained:
    """Open a run, with at most ``limit`` held-out prompts, or a saved shadow, with built-in ones.

    Raises:
        ShadowtuneError: if it is neither, or the run's method has no detached mode.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow")
    trained = _open_run(path, limit) if is_run(path) else _open_shadow(path)
    if not trained.prompts:
        from shadowtune.export.detaching import built_in_prompts

        trained.prompts = built_in_prompts(trained.tokenizer)
    return trained


def _open_run(path: Path, limit: int) -> Trained:
    from shadowtune.evaluation.run import FinishedRun, read_run_config

    config = read_run_config(path)
    if config.method != "shadow":
        raise ConfigError(f"{path} is a {config.method} run; only the shadow method leaves a model that runs alone")
    finished = FinishedRun.open(path)
    prompts, score = _held_out(finished, limit)
    return Trained(finished.model, finished.tokenizer, _card(finished), finished.prompt_format, prompts, score)


def _open_shadow(path: Path) -> Trained:
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.export.card import Card
    from shadowtune.model.loading import read_config
    from shadowtune.model.methods import SHADOW_CLASSES

    config = read_config(str(path))
    classifies = any("SequenceClassification" in name for name in config.architectures or [])
    task = "classification" if classifies else "causal_lm"
    model = SHADOW_CLASSES[task].from_pretrained(str(path))
    base = config.base_name_or_path or ""
    return Trained(model, shadow_tokenizer(path, base), Card(base, task), PromptFormat.load(path))


def shadow_tokenizer(path: Path, base: str) -> Any:
    """Read the tokenizer beside a shadow's files, or that of its base if there is none."""
    from shadowtune.export.exporting import read_tokenizer
    from shadowtune.models import resolve

    own = (path / "tokenizer_config.json").is_file()
    return read_tokenizer(str(path) if own or not base else resolve(base))


def _held_out(finished: "FinishedRun", limit: int) -> tuple[list[list[int]], Score | None]:
    """Prompts of the run's test rows, else of its validation rows, and what scores answers; none if it has neither."""
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
                prompts, score = [prompt.input_ids for prompt in answerable], _score(data, rows, answerable)
        except DataError:  # no such split, moved, or plain text: another source, in the end the built-in prompts
            continue
        if prompts:
            return prompts, score
    return [], None


def _score(data: "Dataset", rows: "list[Row]", prompts: "list[EncodedPrompt]") -> Score:
    from shadowtune.evaluation.scoring import score_answers

    references = data.references(rows, prompts)
    return lambda answers: score_answers(data.metric, answers, references)[0]


def _card(finished: "FinishedRun") -> "Card":
    import json

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
