"""What ``detach`` and ``export`` read: a run directory, or a shadow saved by itself, with prompts to check it on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from shadowtune.evaluation.run import FinishedRun
    from shadowtune.export.card import Card


@dataclass
class Trained:
    """A trained shadow, opened."""

    model: Any
    tokenizer: Any
    card: "Card"
    prompts: list[list[int]] = field(default_factory=list)
    """Held-out prompts as token ids, or built-in ones."""
    targets: list[str] | None = None
    """The true answers of held-out prompts."""


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
    prompts, targets = _held_out(finished, limit)
    return Trained(finished.model, finished.tokenizer, _card(finished), prompts, targets)


def _open_shadow(path: Path) -> Trained:
    from shadowtune.export.card import Card
    from shadowtune.export.exporting import read_tokenizer
    from shadowtune.model.loading import read_config
    from shadowtune.model.methods import PAIRS
    from shadowtune.models import resolve

    config = read_config(str(path))
    classifies = any("SequenceClassification" in name for name in config.architectures or [])
    task = "classification" if classifies else "causal_lm"
    model = PAIRS[task].from_pretrained(str(path))
    base = config.base_name_or_path or ""
    own = (path / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(str(path) if own or not base else resolve(base))
    return Trained(model, tokenizer, Card(base, task))


def _held_out(finished: "FinishedRun", limit: int) -> tuple[list[list[int]], list[str] | None]:
    """Prompts and answers of the run's test rows, else of its validation rows; none if it has neither."""
    from shadowtune.data.encoding import encode_classification, encode_prompts
    from shadowtune.data.prompts import FieldNames
    from shadowtune.data.sources import has_splits, load_rows

    data, tokenizer = finished.config.data, finished.tokenizer
    sources = [(data.train, "test"), (data.train, data.validation_split)] if has_splits(data.train) else []
    sources += [(data.validation, data.validation_split)] if data.validation else []
    fields = FieldNames.from_config(data)
    for source, split in sources:
        try:
            rows = load_rows(source, split, limit)
            if finished.config.task == "classification":
                encoded = encode_classification(rows, tokenizer, fields, data.max_length, "truncate")[0]
                return [row["input_ids"] for row in encoded], None
            prompts = encode_prompts(rows, tokenizer, fields, data.max_length, data.chat_template)
        except DataError:  # no such split, moved, or plain text: another source, in the end the built-in prompts
            continue
        return [prompt.input_ids for prompt in prompts], [prompt.target for prompt in prompts]
    return [], None


def _card(finished: "FinishedRun") -> "Card":
    from shadowtune.export.card import Card, measured_accuracy

    config = finished.config
    training = {
        "data": config.data.train,
        "epochs": f"{config.epochs:g}" if config.max_steps is None else f"{config.max_steps} steps",
        "batch size": str(config.batch_size * config.gradient_accumulation_steps),
        "learning rate": f"{config.optimizer.learning_rate:g}",
        "shadow": f"{config.shadow.num_shadow_layers} blocks, loss weight {config.shadow.shadow_loss_weight:g}",
        "seed": str(config.seed),
    }
    measured: dict[str, str] = {}  # from evaluation-MODE-ROWS.json
    for file in sorted(finished.path.glob("evaluation-*.json")):
        measured |= measured_accuracy(file.stem.split("-")[1], file.read_text())
    return Card(config.model, config.task, training, measured)
