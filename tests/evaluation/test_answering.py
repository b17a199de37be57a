import pytest
import torch

from shadowtune.data.encoding import prompt_ids
from shadowtune.errors import ConfigError, DataError
from shadowtune.evaluation.generation import GenerationOptions, generate_answer
from tests.support.bases import tiny_config
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return perturbed_model()


def test_the_streamed_pieces_are_the_answer_and_the_answer_is_greedy(model):
    tokenizer, pieces = tiny_tokenizer(), []
    result = generate_answer(model, tokenizer, "say one", GenerationOptions(max_new_tokens=7), stream=pieces.append)
    ids = torch.tensor([prompt_ids("say one", tokenizer)])
    expected = model.generate(input_ids=ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
    assert result.answer == tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)
    assert result.new_tokens == len(expected)
    assert result.seconds > 0


def test_beams_are_handed_over_whole(model):
    pieces = []
    result = generate_answer(
        model, tiny_tokenizer(), "say one", GenerationOptions(5, num_beams=3), stream=pieces.append
    )
    assert pieces == [result.answer]


def test_a_seed_repeats_a_sampled_answer(model):
    texts = [
        generate_answer(model, tiny_tokenizer(), "say", GenerationOptions(12, 1.5, seed=s)).answer for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(DataError, match="empty"):
        generate_answer(model, tiny_tokenizer(), prompt, GenerationOptions())


def test_a_prompt_beyond_the_positions_is_refused_with_both_numbers(model):
    with pytest.raises(DataError, match=r"answer \(120\) exceed the model's 128"):
        generate_answer(model, tiny_tokenizer(), "say one", GenerationOptions(120))


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 1.5}, {"num_beams": 0}])
def test_sampling_out_of_range_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerationOptions(**settings)


def test_positions_of_a_base_with_names_of_its_own_are_known():
    with pytest.raises(DataError, match="128 positions"):
        generate_answer(perturbed_model("gpt2"), tiny_tokenizer(), "say one", GenerationOptions(200))


class Spaced:
    """A model whose answers begin with a space, as they do after a prompt like ``Intent:``."""

    device = torch.device("cpu")
    config = tiny_config()
    generation_config = None

    def __init__(self, generate_answer):
        self.ids = tiny_tokenizer()(generate_answer, return_tensors="pt")["input_ids"]

    def generate(self, input_ids, streamer=None, **kwargs):
        if streamer is not None:
            for part in (input_ids, *self.ids[0].split(1)):
                streamer.put(part)
            streamer.end()
        return torch.cat([input_ids, self.ids], -1)


@pytest.mark.parametrize("text", [" the sea is", "  a b ", "sea"])
def test_the_space_before_an_answer_is_no_part_of_it(text):
    pieces = []
    result = generate_answer(Spaced(text), tiny_tokenizer(), "say", GenerationOptions(9), stream=pieces.append)
    assert result.answer == "".join(pieces) == text.lstrip()
    assert generate_answer(Spaced(text), tiny_tokenizer(), "say", GenerationOptions(9)).answer == text.lstrip()
