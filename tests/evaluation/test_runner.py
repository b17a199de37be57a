import math
from dataclasses import replace

import pytest
import torch

from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.data.generation import generate_answers
from shadowtune.errors import DataError
from shadowtune.evaluation.evaluate import (
    EvaluationOptions,
    answer_loss,
    evaluate_classes,
    evaluate_generation,
    top1_agreement,
)
from shadowtune.evaluation.scoring import mean_interval, score_answers
from tests.support.bases import tiny_classifier
from tests.support.runs import causal_rows, class_rows
from tests.support.shadows import perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def model():
    return perturbed_model()


@pytest.fixture(scope="module")
def prompts():
    return [tokens(1, length, seed=length)[0].tolist() for length in (9, 3, 6, 4, 12)]


def test_the_loss_is_the_mean_over_labelled_tokens_whatever_the_batches(model):
    rows = causal_rows(7)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                total, count = total - float(log_probs[position, label]), count + 1
    for batch_size in (1, 3, 7):
        assert answer_loss(model, rows, CausalCollator(0), batch_size) == pytest.approx(total / count, rel=1e-5)


def test_accuracy_counts_the_answers_that_are_the_targets(model, prompts):
    tokenizer, rows = tiny_tokenizer(), causal_rows(5)
    answers, _ = generate_answers(model, tokenizer, prompts, 5)
    references = [[answers[0]], ["x", answers[1]], ["something else"], [answers[3]], ["no"]]
    result = evaluate_generation(
        model, tokenizer, prompts, references, rows, options=EvaluationOptions(max_new_tokens=5)
    )
    assert (result.rows, result.accuracy, result.other_scores) == (5, 0.6, {})
    assert result.scores == [1, 1, 0, 1, 0]
    assert result.accuracy_low < 0.6 < result.accuracy_high
    assert result.predictions == answers
    assert math.isfinite(result.loss)
    assert result.tokens_per_second > 0


def test_the_metric_scores_the_answers_and_its_other_scores_are_told(model, prompts):
    tokenizer, rows = tiny_tokenizer(), causal_rows(5)
    answers, _ = generate_answers(model, tokenizer, prompts, 5)
    references = [[f"{answer} longer"] for answer in answers]
    arguments, options = (model, tokenizer, prompts, references, rows), EvaluationOptions(max_new_tokens=5)
    result = evaluate_generation(*arguments, metric="squad", options=options)
    expected = score_answers("squad", answers, references)
    assert result.accuracy == 0 < expected[1]["f1"] == result.other_scores["f1"]
    fractions = evaluate_generation(*arguments, metric="f1", options=options)
    assert fractions.accuracy == pytest.approx(expected[1]["f1"])
    assert (fractions.accuracy_low, fractions.accuracy_high) == mean_interval(fractions.scores)


def test_classes_are_the_likeliest_and_their_loss_the_mean():
    model, rows = tiny_classifier(), class_rows(7)
    model.config.pad_token_id = 0
    logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    result = evaluate_classes(model, rows, ClassificationCollator(0), EvaluationOptions(batch_size=3))
    assert result.accuracy == float((logits.argmax(-1) == labels).float().mean())
    assert result.scores == (logits.argmax(-1) == labels).float().tolist()
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result.predictions == [str(int(index)) for index in logits.argmax(-1)]


def test_a_class_that_the_model_lacks_is_named_with_its_row():
    rows = class_rows(3)
    rows[1]["labels"] = 3
    with pytest.raises(DataError, match="row 2 has class 3, but the model knows only 0 to 2"):
        evaluate_classes(tiny_classifier(), rows, ClassificationCollator(0))


def test_agreement_is_told_where_another_modes_answers_are_given(model, prompts):
    tokenizer, rows = tiny_tokenizer(), causal_rows(5)
    arguments, options = (model, tokenizer, prompts, [["x"]] * 5, rows), EvaluationOptions(max_new_tokens=5)
    attached = evaluate_generation(*arguments, options=options)
    compared = replace(options, compare_with=attached.answers)
    assert attached.agreement is None
    assert evaluate_generation(*arguments, options=compared).agreement == 1.0
    model.set_mode("detached")
    alone = evaluate_generation(*arguments, options=compared)
    assert alone.agreement == top1_agreement(model, prompts, attached.answers, 0) < 1


def test_classifiers_agree_where_they_choose_the_same_class():
    model, rows = tiny_classifier(), class_rows(7)
    model.config.pad_token_id = 0
    result = evaluate_classes(model, rows, ClassificationCollator(0))
    assert [str(answer[0]) for answer in result.answers] == result.predictions
    said = [[(answer[0] + (index < 2)) % 3] for index, answer in enumerate(result.answers)]
    options = EvaluationOptions(compare_with=said)
    assert evaluate_classes(model, rows, ClassificationCollator(0), options).agreement == pytest.approx(5 / 7)
