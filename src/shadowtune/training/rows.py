"""The rows that a run learns from, encoded and checked."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shadowtune.attach.architectures import ARCHITECTURES
from shadowtune.config.training import TrainConfig
from shadowtune.core.head import IGNORE_INDEX
from shadowtune.data.blocks import BlockReport
from shadowtune.data.checks import check_encoded
from shadowtune.data.collate import CausalCollator, ClassificationCollator, PackedCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.encoding import EncodingReport
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.model.methods import context_length
from shadowtune.model.pair import ShadowPair
from shadowtune.models import resolve

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""From encoded rows to a batch."""


@dataclass(frozen=True)
class TrainingRows:
    """Encoded rows and what they were encoded with."""

    tokenizer: PreTrainedTokenizerBase
    collate: Collator
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]] | None
    num_labels: int | None
    """Classes; None for causal language modelling."""
    report: EncodingReport | BlockReport
    """What became of the training rows."""


def load_training_rows(config: TrainConfig) -> TrainingRows:
    """Load and encode the training and validation rows of a run.

    Raises:
        DataError: if a data set is missing, malformed, or has classes out of range.
        ConfigError: if the task is unknown, or has no classes and they are to be predicted.
        CheckpointError: if the model has no tokenizer.
    """
    tokenizer = load_tokenizer(config.model, config.revision)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    data = Dataset.open(config.data)
    classify = config.task == "classification"
    train, report = data.encode(data.training_rows(), tokenizer, classify, training=True)
    held_out = data.validation_rows()
    validation = None if held_out is None else data.encode(held_out, tokenizer, classify, training=True)[0]
    if not classify:
        flash = config.attention.startswith("flash")
        collate = PackedCollator(with_bounds=flash) if config.padding_free else CausalCollator(pad)
        return TrainingRows(tokenizer, collate, train, validation, None, report)
    num_labels = _count_classes([*train, *(validation or [])], config.num_labels or data.num_labels)
    return TrainingRows(tokenizer, ClassificationCollator(pad), train, validation, num_labels, report)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad; raises CheckpointError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a tokenizer from {name}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer of {name} has neither a padding nor an end token; give it a pad_token")
    return tokenizer


def frequent_tokens(rows: Iterable[Mapping[str, Any]], limit: int) -> Tensor:
    """Return the ids (K,) of the most frequent labelled tokens of encoded rows, in order; at most ``limit``."""
    counts = Counter(label for row in rows for label in row["labels"] if label != IGNORE_INDEX)
    return torch.tensor(sorted(token for token, _ in counts.most_common(limit)))


def check_rows(rows: TrainingRows, model: nn.Module) -> None:
    """Check that the rows fit the model and have something to learn, and tell the model how they are padded.

    Raises:
        DataError: naming the first rows at fault.
        ConfigError: if rows are packed and the model would let documents see each other.
    """
    if isinstance(rows.collate, PackedCollator):
        _check_packing(model)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    for split in (rows.train, rows.validation):
        if split is not None:
            check_encoded(split, text.vocab_size, context_length(model))
    if text.pad_token_id is None:
        config.pad_token_id = rows.tokenizer.pad_token_id


def _check_packing(model: nn.Module) -> None:
    """Check that each network of the model keeps packed documents apart."""
    configs: list[Any] = [model.config]
    if isinstance(model, ShadowPair):
        configs.append(model.shadow.backbone.config)
    packing = {name for name, architecture in ARCHITECTURES.items() if architecture.packs}
    for config in configs:
        model_type = config.get_text_config(decoder=True).model_type
        if model_type not in packing:
            raise ConfigError(
                f"padding_free=true does not work with {model_type}, which is not known to keep the documents of a row "
                f"apart, as {', '.join(sorted(packing))} do; set padding_free=false"
            )


def _count_classes(rows: list[dict[str, Any]], num_labels: int | None) -> int:
    """Return how many classes there are; raises DataError if a row has one beyond ``num_labels``."""
    highest = max(rows, key=lambda row: row["labels"])
    if num_labels is not None and highest["labels"] >= num_labels:
        raise DataError(
            f"row {highest['row']} has class {highest['labels']}, but num_labels={num_labels} allows only 0 to "
            f"{num_labels - 1}"
        )
    return num_labels or 1 + int(highest["labels"])
