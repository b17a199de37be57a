"""The training data of a run: rows loaded, encoded, checked against the model, with tokenizer and collator."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shadowtune.attach.architectures import ARCHITECTURES
from shadowtune.config.training import TrainConfig
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.blocks import BlockReport
from shadowtune.data.chat_template import load_tokenizer_and_format
from shadowtune.data.collate import CausalCollator, ClassificationCollator, PackedCollator
from shadowtune.data.dataset import Dataset
from shadowtune.data.encoding import EncodingReport, check_encoded, check_tokenizer
from shadowtune.data.generation import ends_to_record
from shadowtune.data.labels import REGRESSION, SINGLE, Labels, class_weights
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError, DataError, ShadowtuneError
from shadowtune.model.methods import context_length
from shadowtune.model.modeling import ShadowPreTrainedModel
from shadowtune.models import resolve

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""Encoded examples to a batch."""


@dataclass(frozen=True)
class TrainingData:
    """Encoded examples, and what they were encoded with."""

    tokenizer: PreTrainedTokenizerBase
    collate: Collator
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]] | None
    num_labels: int | None
    """Number of classes; None for causal language modelling."""
    report: EncodingReport | BlockReport
    """Counts of the training examples."""
    prompt_format: PromptFormat = field(default_factory=PromptFormat)
    """As read off the training data; ``ends`` do not include the base's."""
    unread: tuple[str, ...] = ()
    """Fields of the rows that nothing reads."""
    labels: Labels | None = None
    """Of classification: how labels became numbers."""
    formats: str = ""
    """How the rows were read: the formats, and the number of examples in each and for validation."""
    deferral: list[dict[str, Any]] | None = None
    """Examples set aside for the deferral head, which are not in ``train``; None without one."""


def load_training_data(config: TrainConfig) -> TrainingData:
    """Load and encode the training and validation data of a run.

    Raises:
        DataError: if a data set is missing, malformed, or has classes out of range.
        ConfigError: if the task is unknown, or has no classes to predict.
        CheckpointError: if the model has no tokenizer.
    """
    tokenizer = load_tokenizer(config.model, config.revision)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    data = Dataset.open(config.data)
    classify = config.task == "classification"
    train, report = data.encode(data.training_rows(), tokenizer, classify, training=True)
    form = _prompt_format(data, report)
    unread = () if data.task is not None or isinstance(report, BlockReport) else report.unread
    rows = data.validation_rows()
    validation = None
    if rows is not None:
        labels = report.labels if isinstance(report, EncodingReport) else None
        validation = replace(data, form=form, labels=labels).encode(rows, tokenizer, classify, training=True)[0]
    formats = _describe(config, report, None if rows is None else len(rows))
    if not classify:
        flash = config.attention.startswith("flash")
        collate = PackedCollator(with_bounds=flash) if config.padding_free else CausalCollator(pad)
        fraction = config.deferral_fraction if config.method == "shadow" else 0.0
        train, deferral = set_aside(train, fraction, config.seed)
        return TrainingData(tokenizer, collate, train, validation, None, report, form, unread, None, formats, deferral)
    assert isinstance(report, EncodingReport) and report.labels is not None
    num_labels = _count_classes([*train, *(validation or [])], report.labels, config.num_labels)
    given = config.class_weights
    weights = None if given is None else class_weights(given, report.labels, train, num_labels)
    padded = ClassificationCollator(pad, weights)
    return TrainingData(tokenizer, padded, train, validation, num_labels, report, form, unread, report.labels, formats)


def set_aside(
    examples: list[dict[str, Any]], fraction: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Split examples into those to learn, in their order, and a random fraction of at least one; None for 0.

    Raises:
        DataError: if none would be left to learn.
    """
    if not fraction:
        return examples, None
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise DataError(
            f"deferral_fraction={fraction:g} of {len(examples)} training examples leaves none to learn; lower it"
        )
    chosen = set(random.Random(f"deferral {seed}").sample(range(len(examples)), count))
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for index, example in enumerate(examples):
        parts[index in chosen].append(example)
    return parts


def _describe(config: TrainConfig, report: EncodingReport | BlockReport, validation: int | None) -> str:
    """Say in one line how the rows were read."""
    if isinstance(report, BlockReport) or config.data.task is not None:
        return ""
    held_out = "hold-out" if config.data.hold_out_share is not None else "for validation"
    classes = "" if report.labels is None else f", {report.labels}"
    return report.formats + classes + ("" if validation is None else f", {validation:,} {held_out}")


def _prompt_format(data: Dataset, report: EncodingReport | BlockReport) -> PromptFormat:
    if isinstance(report, EncodingReport):
        return data.prompt_format.learned_from(report)
    return replace(data.prompt_format, answers=False, ends=() if report.end is None else (report.end,))


def format_to_record(data: TrainingData, generation_config: Any) -> PromptFormat:
    """Return the prompt format to save with the model: with all tokens that end an answer.

    Args:
        data: of the training.
        generation_config: of the base; None of a classifier.
    """
    form = data.prompt_format
    if generation_config is None or data.num_labels is not None:
        return replace(form, ends=())
    inside = data.report.inside if isinstance(data.report, EncodingReport) else ()
    return replace(form, ends=ends_to_record(form.ends, inside, generation_config, data.tokenizer))


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that it has a padding token; raises CheckpointError if that fails."""
    try:
        tokenizer, _ = load_tokenizer_and_format(str(resolve(name)), revision=revision or "main")
    except (OSError, ValueError) as error:
        if isinstance(error, ShadowtuneError):
            raise
        raise CheckpointError(f"cannot load a tokenizer from {name}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer of {name} has neither a padding nor an end token; give it a pad_token")
    return tokenizer


def frequent_tokens(examples: Iterable[Mapping[str, Any]], limit: int) -> Tensor:
    """Return the ids (K,) of the ``limit`` most frequent labels of encoded examples, in ascending order."""
    counts = Counter(label for example in examples for label in example["labels"] if label != IGNORE_INDEX)
    return torch.tensor(sorted(token for token, _ in counts.most_common(limit)))


def check_data(data: TrainingData, model: nn.Module) -> None:
    """Check that the data fit the model and have labels; set the model's padding token if it has none.

    Raises:
        DataError: naming the first invalid examples, or the tokens that the model does not know.
        ConfigError: if examples are packed and the model would attend across them.
    """
    if isinstance(data.collate, PackedCollator):
        _check_packing(model)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    check_tokenizer(data.tokenizer, text.vocab_size)
    for split in (data.train, data.validation):
        if split is not None:
            check_encoded(split, text.vocab_size, context_length(model))
    if text.pad_token_id is None:
        config.pad_token_id = data.tokenizer.pad_token_id


def _check_packing(model: nn.Module) -> None:
    configs: list[Any] = [model.config]
    if isinstance(model, ShadowPreTrainedModel):
        configs.append(model.shadow.backbone.config)
    packing = {name for name, architecture in ARCHITECTURES.items() if architecture.packs}
    for config in configs:
        model_type = config.get_text_config(decoder=True).model_type
        if model_type not in packing:
            raise ConfigError(
                f"padding_free=true does not work with {model_type}, which is not known to keep the documents of a row "
                f"apart, as {', '.join(sorted(packing))} do; set padding_free=false"
            )


def _count_classes(examples: list[dict[str, Any]], labels: Labels, num_labels: int | None) -> int:
    """Return the number of classes; raises DataError if the labels have more than ``num_labels``."""
    if labels.count is not None:
        if num_labels is not None and (num_labels < labels.count or labels.problem_type == REGRESSION):
            raise DataError(f"num_labels={num_labels} does not fit the labels, {labels}; leave it out")
        return num_labels if num_labels is not None and labels.problem_type == SINGLE else labels.count
    highest = max(examples, key=lambda example: example["labels"])
    if num_labels is not None and highest["labels"] >= num_labels:
        raise DataError(
            f"row {highest['row']} has class {highest['labels']}, but num_labels={num_labels} allows only 0 to "
            f"{num_labels - 1}"
        )
    return num_labels or 1 + int(highest["labels"])
