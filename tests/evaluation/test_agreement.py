import pytest
import torch

from shadowtune.errors import DataError
from shadowtune.evaluation.evaluate import top1_agreement
from tests.support.shadows import perturbed_model, tokens

PAD = 0


@pytest.fixture(scope="module")
def model():
    return perturbed_model().eval()


@pytest.fixture(scope="module")
def prompts():
    return [tokens(1, length, seed=length)[0].tolist() for length in (9, 3, 6, 4, 12)]


@pytest.fixture(scope="module")
def answers(model, prompts):
    """Greedy answers of different lengths, found token by token."""
    found = []
    for length, prompt in zip((5, 1, 0, 4, 3), prompts, strict=True):
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def one_by_one(model, prompts, answers):
    agreed = [
        int(model(input_ids=torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1].argmax()) == token
        for prompt, answer in zip(prompts, answers, strict=True)
        for place, token in enumerate(answer)
    ]
    return sum(agreed) / len(agreed)


def test_a_model_agrees_with_its_own_greedy_answers(model, prompts, answers):
    assert top1_agreement(model, prompts, answers, PAD, batch_size=2) == 1.0


def test_another_mode_agrees_as_often_as_token_by_token(model, prompts, answers):
    mixed = [*answers[:3], *(tokens(1, len(answer), seed=1)[0].tolist() for answer in answers[3:])]
    expected = one_by_one(model, prompts, mixed)
    assert 0 < expected < 1
    assert top1_agreement(model, prompts, mixed, PAD, batch_size=3) == expected
    model.set_mode("detached")
    try:
        alone = one_by_one(model, prompts, answers)
        assert top1_agreement(model, prompts, answers, PAD, batch_size=2) == alone < 1
    finally:
        model.set_mode("attached")


def test_answers_without_a_token_are_refused(model, prompts):
    with pytest.raises(DataError, match="no answer"):
        top1_agreement(model, prompts[:1], [[]], PAD)
