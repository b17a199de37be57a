import math

import pytest
import torch

from shadowtune.data.collate import CausalCollator, ClassificationCollator
from shadowtune.errors import DataError
from shadowtune.evaluation.runner import answer_loss, evaluate_classes, evaluate_generation, generate_answers
from tests.support.bases import tiny_classifier
from tests.support.runs import causal_rows, class_rows
from tests.support.shadows import perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return perturbed_model()


@pytest.fixture(scope="module")
def prompts():
    return [tokens(1, length, seed=length)[0].tolist() for length in (9, 3, 6, 4, 12)]


def test_batched_answers_are_those_of_one_at_a_time_in_the_prompts_order(model, prompts):
    tokenizer, seen = tiny_tokenizer(), []
    together, count = generate_answers(
        model, tokenizer, prompts, 6, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    alone = [generate_answers(model, tokenizer, [prompt], 6)[0][0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1
    assert 1 <= count <= 6 * len(prompts)
    assert seen == [(3, 5), (5, 5)]


def test_no_prompts_is_an_error(model):
    with pytest.raises(DataError, match="no prompts"):
        generate_answers(model, tiny_tokenizer(), [], 3)


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
    targets = [answers[0], answers[1], "something else", answers[3], "no"]
    result = evaluate_generation(model, tokenizer, prompts, targets, rows, CausalCollator(0), max_new_tokens=5)
    assert (result.rows, result.accuracy) == (5, 0.6)
    assert result.accuracy_low < 0.6 < result.accuracy_high
    assert result.predictions == answers
    assert math.isfinite(result.loss)
    assert result.tokens_per_second > 0


def test_classes_are_the_likeliest_and_their_loss_the_mean():
    model, rows = tiny_classifier(), class_rows(7)
    model.config.pad_token_id = 0
    logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    result = evaluate_classes(model, rows, ClassificationCollator(0), batch_size=3)
    assert result.accuracy == float((logits.argmax(-1) == labels).float().mean())
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result.predictions == [str(int(index)) for index in logits.argmax(-1)]
