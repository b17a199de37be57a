"""Evaluation of a model on held-out examples: greedy answers in batches, classes, the loss, top-1 agreement."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.losses import IGNORE_INDEX, classification_loss
from shadowtune.data.collate import CausalCollator, left_pad
from shadowtune.data.generation import Progress, generate_answers
from shadowtune.data.labels import MULTI, REGRESSION, SINGLE, Labels
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.evaluation.generation import GenerationOptions, stream_answer
from shadowtune.evaluation.scoring import mean_interval, score_answers
from shadowtune.export.loading import LoadedModel
from shadowtune.model.objective import causal_loss


@dataclass(frozen=True)
class Evaluation:
    """Result of one model in one mode."""

    rows: int
    accuracy: float
    """Mean of the scores."""
    accuracy_low: float
    accuracy_high: float
    loss: float | None
    """Mean cross-entropy per token of the true answers; None of an exported model, which only generates."""
    evaluate_seconds: float
    tokens_per_second: float
    """Generated tokens per second, all sequences of a batch together; for classes, tokens read."""
    task: str | None = None
    """Name and version of the task, if the examples were a task's."""
    other_scores: dict[str, float] = field(default_factory=dict)
    """Means of the metric's further scores, such as "f1" of SQuAD."""
    agreement: float | None = None
    """If another mode's answers were given: the share of their tokens, or classes, that this model predicts too."""
    scores: list[float] = field(repr=False, default_factory=list)
    """Of each example, between 0 and 1, in the order of the examples."""
    predictions: list[str] = field(repr=False, default_factory=list)
    answers: list[list[int]] = field(repr=False, default_factory=list)
    """Token ids of the predictions, with the end token; or the classes alone."""


def _no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation that do not change the examples."""

    batch_size: int = 32
    """Examples at a time."""
    max_new_tokens: int | None = None
    """None for the task's limit, or enough for the longest reference answer and its end token."""
    speculate: SpeculationConfig | None = None
    """Speculative decoding, which changes no answer; None to decode without drafts."""
    compare_with: Sequence[Sequence[int]] | None = None
    """``Evaluation.answers`` of another mode or model on the same examples, for ``Evaluation.agreement``."""
    progress: Progress = _no_progress
    """Called with the number of finished examples and their total."""


@torch.inference_mode()
def answer_loss(model: Any, rows: Sequence[dict[str, Any]], collate: Callable[[Any], Any], batch_size: int) -> float:
    """Mean cross-entropy per labelled token of encoded examples with ``input_ids`` and ``labels``."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = collate([rows[index] for index in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += causal_loss(model, batch, num_items_in_batch=1).double().cpu()
        count += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return float(total / max(count, 1))


def evaluate_generation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    references: Sequence[Sequence[str]],
    encoded: Sequence[dict[str, Any]],
    metric: str = "exact_match",
    form: PromptFormat | None = None,
    options: EvaluationOptions = EvaluationOptions(),
) -> Evaluation:
    """Score greedy answers against the references, and measure the loss of the reference answers.

    Args:
        prompts: token ids of each prompt.
        references: for each prompt, all correct answers.
        encoded: prompt and reference answer as in training, with labels.
        metric: one of ``evaluation.scoring.METRICS``.
        form: prompt format of the model, which defines the end of an answer.
    """
    longest = max(sum(label != IGNORE_INDEX for label in row["labels"]) for row in encoded)
    start = time.perf_counter()
    predictions, answers = generate_answers(
        model,
        tokenizer,
        prompts,
        options.max_new_tokens or longest + 1,
        options.batch_size,
        options.progress,
        options.speculate,
        form,
    )
    seconds = time.perf_counter() - start
    pad, agreement = tokenizer.pad_token_id, None
    scores, others = score_answers(metric, predictions, references)
    loss = answer_loss(model, encoded, CausalCollator(pad), options.batch_size)
    if options.compare_with is not None:
        agreement = top1_agreement(model, prompts, options.compare_with, pad, options.batch_size)
    return _evaluation(
        scores,
        loss=loss,
        evaluate_seconds=seconds,
        tokens_per_second=sum(len(answer) for answer in answers) / seconds,
        other_scores=others,
        agreement=agreement,
        predictions=predictions,
        answers=answers,
    )


def evaluate_exported(
    opened: LoadedModel,
    prompts: Sequence[list[int]],
    references: Sequence[Sequence[str]],
    encoded: Sequence[dict[str, Any]],
    metric: str = "exact_match",
    options: EvaluationOptions = EvaluationOptions(),
) -> Evaluation:
    """Score greedy answers of an exported model, one after the other; the loss is not measured.

    Args:
        opened: the model.
        prompts, references, encoded, metric: as for ``evaluate_generation``.
        options: ``speculate`` and ``compare_with`` do not apply.
    """
    longest = max(sum(label != IGNORE_INDEX for label in row["labels"]) for row in encoded)
    limits = GenerationOptions(options.max_new_tokens or longest + 1)
    predictions, tokens = [], 0
    start = time.perf_counter()
    for done, ids in enumerate(prompts, start=1):
        answered = stream_answer(opened, ids, limits)
        mark = opened.prompt_format.content_mark
        predictions.append((answered.answer.rpartition(mark)[2] if mark else answered.answer).strip())
        tokens += answered.new_tokens
        options.progress(done, len(prompts))
    seconds = time.perf_counter() - start
    scores, others = score_answers(metric, predictions, references)
    measured = {"evaluate_seconds": seconds, "tokens_per_second": tokens / seconds, "other_scores": others}
    return _evaluation(scores, loss=None, predictions=predictions, **measured)


def _evaluation(scores: list[float], **measured: Any) -> Evaluation:
    """Build the result: scores, their mean and its interval, and the other measurements."""
    low, high = mean_interval(scores)
    return Evaluation(len(scores), sum(scores) / len(scores), low, high, scores=scores, **measured)


@torch.inference_mode()
def evaluate_classes(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Any], Any],
    options: EvaluationOptions = EvaluationOptions(),
) -> Evaluation:
    """Evaluate a classifier: scores of its predictions, and the mean loss per label.

    The score of an example is 1 if the most likely class is its label; of several classes, if all are predicted right
    (and "f1" is over all labels together); of a number, if the prediction is within one half of it (and there is the
    "mean_absolute_error").

    Raises:
        DataError: naming the first example with a class that the model lacks.
    """
    model.eval()
    labels = Labels.of_model(model.config)
    for row in rows if labels.problem_type == SINGLE else ():
        if row["labels"] >= model.config.num_labels:
            highest = model.config.num_labels - 1
            raise DataError(f"row {row['row']} has class {row['labels']}, but the model knows only 0 to {highest}")
    outputs: dict[int, list[float]] = {}
    tokens, total = 0, 0.0
    start = time.perf_counter()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for begin in range(0, len(order), options.batch_size):
        chosen = order[begin : begin + options.batch_size]
        batch = collate([rows[index] for index in chosen])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = batch.pop("labels")
        logits = model(**batch).logits.float()
        total += float(classification_loss(logits, targets, labels.problem_type, num_items_in_batch=1))
        outputs.update(zip(chosen, logits.tolist(), strict=True))
        tokens += int(batch["attention_mask"].sum())
        options.progress(begin + len(chosen), len(order))
    seconds = time.perf_counter() - start
    made, truth = [outputs[index] for index in range(len(rows))], [row["labels"] for row in rows]
    answers, scores, others = _score_labels(labels, made, truth)
    agreement = None
    if options.compare_with is not None:
        agreement = sum(map(list.__eq__, answers, map(list, options.compare_with))) / len(rows)
    several = labels.problem_type == MULTI
    return _evaluation(
        scores,
        loss=total / (len(rows) * (len(truth[0]) if several else 1)),
        evaluate_seconds=seconds,
        tokens_per_second=tokens / seconds,
        other_scores=others,
        agreement=agreement,
        predictions=[", ".join(labels.name(number) for number in answer) for answer in answers]
        if labels.problem_type != REGRESSION
        else [f"{output[0]:g}" for output in made],
        answers=answers,
    )


def _score_labels(
    labels: Labels, outputs: Sequence[Sequence[float]], truth: Sequence[Any]
) -> tuple[list[list[int]], list[float], dict[str, float]]:
    """Return predicted classes (of regression the nearest whole number), scores of the examples, and further scores.

    Args:
        labels: of the model.
        outputs: logits of each example.
        truth: its encoded label.
    """
    if labels.problem_type == REGRESSION:
        errors = [abs(output[0] - label) for output, label in zip(outputs, truth, strict=True)]
        mean = {"mean_absolute_error": sum(errors) / len(errors)}
        return [[round(output[0])] for output in outputs], [float(error <= 0.5) for error in errors], mean
    if labels.problem_type == MULTI:
        answers = [[number for number, logit in enumerate(output) if logit > 0] for output in outputs]
        correct = [[number for number, value in enumerate(label) if value] for label in truth]
        both = sum(len({*one} & {*two}) for one, two in zip(answers, correct, strict=True))
        f1 = 2 * both / max(sum(map(len, answers)) + sum(map(len, correct)), 1)
        return answers, [float(one == two) for one, two in zip(answers, correct, strict=True)], {"f1": f1}
    answers = [[max(range(len(output)), key=output.__getitem__)] for output in outputs]
    return answers, [float(answer[0] == label) for answer, label in zip(answers, truth, strict=True)], {}


@torch.inference_mode()
def top1_agreement(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int = 32,
) -> float:
    """Share of the answers' tokens that are the argmax of ``model``, given the prompt and the answer up to there.

    With the greedy answers of the attached model and the shadow alone as ``model``, this is the acceptance rate of
    drafts of one token.

    Args:
        model: a causal language model; it is left in eval mode.
        prompts: token ids of each prompt, at least one.
        answers: token ids of each answer, the end-of-sequence token included if it was generated.
        pad_token_id: fills batches on the left.

    Raises:
        DataError: if no answer has a token.
    """
    if not any(answers):
        raise DataError("no answer has a token to agree on")
    model.eval()
    examples = sorted(zip(prompts, answers, strict=True), key=lambda each: len(each[0]) + len(each[1]))
    agreed = 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = left_pad([[*prompt, *answer] for prompt, answer in chosen], pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        lengths = torch.tensor([[len(answer)] for _, answer in chosen], device=model.device)
        longest = int(lengths.max())
        logits = model(**batch, logits_to_keep=longest + 1).logits[:, :-1]
        tokens = batch["input_ids"][:, -longest:] if longest else batch["input_ids"][:, :0]
        position = torch.arange(longest, 0, -1, device=model.device)  # counted from the end
        agreed += int(((logits.argmax(-1) == tokens) & (position <= lengths)).sum())
    return agreed / sum(len(answer) for answer in answers)
