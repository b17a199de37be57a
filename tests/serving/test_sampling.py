import pytest
import torch

from shadowtune.serving.requests import SamplingParams
from shadowtune.serving.sampling import logits_processors, random_generator, sample

PROMPT = 3


def scores(sampling, said=(), logits=None):
    tokens = torch.tensor([[0] * PROMPT + list(said)])
    start = torch.tensor([[2.0, 1.0, 0.0, -1.0]] if logits is None else [logits])
    return logits_processors(sampling, PROMPT)(tokens, start.clone())[0]


def test_the_defaults_change_nothing():
    assert scores(SamplingParams()).tolist() == [2.0, 1.0, 0.0, -1.0]


def test_penalties_count_the_answer_and_not_the_prompt():
    found = scores(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), said=[1, 1, 3])
    assert found.tolist() == [2.0, 1.0 - 0.5 - 2 * 0.25, 0.0, -1.0 - 0.5 - 0.25]


def test_a_bias_is_added_to_its_tokens():
    assert scores(SamplingParams(logit_bias={3: 100.0, 0: -2.0})).tolist() == [0.0, 1.0, 0.0, 99.0]


@pytest.mark.parametrize(
    ("settings", "left"),
    [({"top_k": 2}, 2), ({"top_p": 0.5}, 1), ({"min_p": 0.2}, 2), ({"temperature": 0.0, "top_k": 2}, 4)],
)
def test_warpers_leave_what_may_be_drawn_and_matter_in_drawing_alone(settings, left):
    assert int(torch.isfinite(scores(SamplingParams(**settings))).sum()) == left


def test_temperature_divides():
    assert scores(SamplingParams(temperature=0.5)).tolist() == [4.0, 2.0, 0.0, -2.0]


def test_temperature_zero_takes_the_likeliest():
    assert (
        sample(torch.tensor([0.0, 3.0, 2.0]), SamplingParams(temperature=0.0), random_generator(SamplingParams())) == 1
    )


def test_draws_fall_as_the_softmax_of_the_scores():
    source, p = random_generator(SamplingParams(seed=1)), torch.tensor([0.6, 0.3, 0.1])
    drawn = torch.tensor([sample(p.log(), SamplingParams(), source) for _ in range(4000)])
    found = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(found, p, atol=0.03)


def test_a_seed_repeats_and_no_seed_does_not():
    logits = torch.zeros(50)

    def draws(seed):
        sampling = SamplingParams(seed=seed)
        source = random_generator(sampling)
        return [sample(logits, sampling, source) for _ in range(12)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_any_whole_number_is_a_seed():
    assert random_generator(SamplingParams(seed=-1)).initial_seed() >= 0
