"""Run a model over held-out rows: greedy answers in left-padded, cached batches, and the loss on the true ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.data.collate import left_pad
from shadowtune.errors import DataError
from shadowtune.evaluation.scoring import accuracy_interval, exact_match
from shadowtune.model.objective import causal_loss

Progress = Callable[[int, int], None]
"""Called with the number of rows finished, and of all."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one model in one mode."""

    rows: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    """Mean cross-entropy per token of the true answers."""
    evaluate_seconds: float
    tokens_per_second: float
    """Tokens generated per second of generation, all rows of a batch together; for classes, tokens read."""
    predictions: list[str] = field(repr=False, default_factory=list)


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> tuple[list[str], int]:
    """Answer prompts greedily, rows of similar length together.

    Args:
        model: anything with ``generate``; it is left in eval mode.
        prompts: token ids of each prompt, as the model saw them in training.

    Returns:
        The answers in the order of the prompts, without special tokens, and how many tokens were generated.
    """
    if not prompts:
        raise DataError("there are no prompts to answer")
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers, generated = [""] * len(prompts), 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = left_pad([prompts[index] for index in chosen], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        fresh = output[:, batch["input_ids"].shape[1] :]
        generated += int((fresh != tokenizer.pad_token_id).sum())
        for index, text in zip(chosen, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
        progress(start + len(chosen), len(order))
    return answers, generated


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
    targets: list[str],
    encoded: Sequence[dict[str, Any]],
    collate: Callable[[Any], Any],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Compare greedy answers with the true ones, and measure the loss on the true ones.

    Args:
        prompts: token ids of each prompt.
        targets: the true answer of each.
        encoded: prompt and true answer as trained on, with labels.
        max_new_tokens: by default enough for the longest true answer and its end.
    """
    if max_new_tokens is None:
        longest = max(sum(label != -100 for label in row["labels"]) for row in encoded)
        max_new_tokens = longest + 1
    start = time.perf_counter()
    predictions, generated = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    seconds = time.perf_counter() - start
    correct = sum(exact_match(predictions, targets))
    low, high = accuracy_interval(correct, len(targets))
    loss = answer_loss(model, encoded, collate, batch_size)
    return Evaluation(
        rows=len(targets),
        accuracy=correct / len(targets),
        accuracy_low=low,
        accuracy_high=high,
        loss=loss,
        evaluate_seconds=seconds,
        tokens_per_second=generated / seconds,
        predictions=predictions,
    )


@torch.inference_mode()
def evaluate_classes(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Any], Any],
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Share of encoded rows whose most likely class is their label, and the mean loss."""
    model.eval()
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
    correct = sum(predictions[index] == int(row["labels"]) for index, row in enumerate(rows))
    low, high = accuracy_interval(correct, len(rows))
    return Evaluation(
        rows=len(rows),
        accuracy=correct / len(rows),
        accuracy_low=low,
        accuracy_high=high,
        loss=total / len(rows),
        evaluate_seconds=seconds,
        tokens_per_second=tokens / seconds,
        predictions=[str(predictions[index]) for index in range(len(rows))],
    )
