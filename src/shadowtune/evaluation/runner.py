"""Run a model over held-out rows: greedy answers in left-padded, cached batches, and the loss on the true ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.data.generation import Progress, generate_answers
from shadowtune.errors import DataError
from shadowtune.evaluation.agreement import top1_agreement
from shadowtune.evaluation.scoring import mean_interval, score_answers
from shadowtune.model.objective import causal_loss


@dataclass(frozen=True)
class Evaluation:
    """Result of one model in one mode."""

    rows: int
    accuracy: float
    """Mean of the rows' scores."""
    accuracy_low: float
    accuracy_high: float
    loss: float
    """Mean cross-entropy per token of the true answers."""
    evaluate_seconds: float
    tokens_per_second: float
    """Tokens generated per second of generation, all rows of a batch together; for classes, tokens read."""
    task: str | None = None
    """Name and version of the task whose rows these were, if they were a task's."""
    other_scores: dict[str, float] = field(default_factory=dict)
    """Means of what the metric gives beside its main score, such as "f1" of SQuAD."""
    agreement: float | None = None
    """Where another mode's answers were given: the share of their tokens, or classes, that this one finds likeliest."""
    scores: list[float] = field(repr=False, default_factory=list)
    """Of each row, between 0 and 1; in the rows' order."""
    predictions: list[str] = field(repr=False, default_factory=list)
    answers: list[list[int]] = field(repr=False, default_factory=list)
    """The predictions as token ids, the token that ends them included; or the class alone."""


@torch.inference_mode()
def answer_loss(model: Any, rows: Sequence[dict[str, Any]], collate: Callable[[Any], Any], batch_size: int) -> float:
    """Mean cross-entropy per labelled token, of encoded rows with ``input_ids`` and ``labels``."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = collate([rows[index] for index in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += causal_loss(model, batch, num_items_in_batch=1).double().cpu()
        count += int((batch["labels"][:, 1:] != -100).sum())
    return float(total / max(count, 1))


def evaluate_generation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    references: Sequence[Sequence[str]],
    encoded: Sequence[dict[str, Any]],
    collate: Callable[[Any], Any],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
    metric: str = "exact_match",
    said: Sequence[Sequence[int]] | None = None,
    speculate: SpeculationConfig | None = None,
    recorded_ends: Sequence[int] = (),
    content_mark: str = "",
) -> Evaluation:
    """Compare greedy answers with the true ones, and measure the loss on the true ones.

    Args:
        prompts: token ids of each prompt.
        references: for each, all answers that count as right.
        encoded: prompt and true answer as trained on, with labels.
        max_new_tokens: by default enough for the longest true answer and its end.
        metric: one of ``evaluation.scoring.METRICS``.
        said: ``Evaluation.answers`` of another mode or model on these prompts, to say how much this one agrees.
        speculate: as for ``generate_answers``.
        recorded_ends: likewise.
        content_mark: likewise.
    """
    if max_new_tokens is None:
        longest = max(sum(label != -100 for label in row["labels"]) for row in encoded)
        max_new_tokens = longest + 1
    start = time.perf_counter()
    limits = (max_new_tokens, batch_size)
    predictions, answers = generate_answers(
        model, tokenizer, prompts, *limits, progress, speculate, recorded_ends, content_mark
    )
    seconds = time.perf_counter() - start
    pad = tokenizer.pad_token_id
    scores, others = score_answers(metric, predictions, references)
    return _evaluation(
        scores,
        loss=answer_loss(model, encoded, collate, batch_size),
        evaluate_seconds=seconds,
        tokens_per_second=sum(len(answer) for answer in answers) / seconds,
        other_scores=others,
        agreement=None if said is None else top1_agreement(model, prompts, said, pad, batch_size),
        predictions=predictions,
        answers=answers,
    )


def _evaluation(scores: list[float], **measured: Any) -> Evaluation:
    """Put scores, their mean and its interval beside what else was measured."""
    low, high = mean_interval(scores)
    return Evaluation(len(scores), sum(scores) / len(scores), low, high, scores=scores, **measured)


@torch.inference_mode()
def evaluate_classes(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Any], Any],
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
    said: Sequence[Sequence[int]] | None = None,
) -> Evaluation:
    """Share of encoded rows whose most likely class is their label, and the mean loss.

    Args:
        said: ``Evaluation.answers`` of another mode or model on these rows, to say how much this one agrees.

    Raises:
        DataError: naming the first row with a class that the model lacks.
    """
    model.eval()
    highest = model.config.num_labels - 1
    for row in rows:
        if row["labels"] > highest:
            raise DataError(f"row {row['row']} has class {row['labels']}, but the model knows only 0 to {highest}")
    predictions: dict[int, int] = {}
    tokens, total = 0, 0.0
    start = time.perf_counter()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = collate([rows[index] for index in chosen])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        predictions.update(zip(chosen, logits.argmax(-1).tolist(), strict=True))
        tokens += int(batch["attention_mask"].sum())
        progress(begin + len(chosen), len(order))
    seconds = time.perf_counter() - start
    answers = [[predictions[index]] for index in range(len(rows))]
    return _evaluation(
        [float(predictions[index] == int(row["labels"])) for index, row in enumerate(rows)],
        loss=total / len(rows),
        evaluate_seconds=seconds,
        tokens_per_second=tokens / seconds,
        agreement=None if said is None else sum(map(list.__eq__, answers, map(list, said))) / len(rows),
        predictions=[str(answer[0]) for answer in answers],
        answers=answers,
    )
