import pytest
import torch

from shadowtune.data.generation import end_tokens, generate_answers
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from tests.support.shadows import perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def model():
    return perturbed_model()


@pytest.fixture(scope="module")
def prompts():
    return [tokens(1, length, seed=length)[0].tolist() for length in (9, 3, 6, 4, 12)]


def test_batched_answers_are_those_of_one_at_a_time_in_the_prompts_order(model, prompts):
    tokenizer, seen = tiny_tokenizer(), []
    together, ids = generate_answers(
        model, tokenizer, prompts, 6, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    alone = [generate_answers(model, tokenizer, [prompt], 6)[0][0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1
    assert all(1 <= len(answer) <= 6 for answer in ids)
    assert [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids] == together
    assert seen == [(3, 5), (5, 5)]


def test_no_prompts_is_an_error(model):
    with pytest.raises(DataError, match="no prompts"):
        generate_answers(model, tiny_tokenizer(), [], 3)


def test_an_answer_ends_with_the_tokenizers_end_even_if_the_model_does_not_know_it(model, prompts):
    tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        ids = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6)
        first, second, *_ = ids[0, len(prompt) :].tolist()
        if first > 3 and second not in (first, 0):  # two different tokens, neither of them special
            break
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(second)
    assert generate_answers(model, tokenizer, [prompt], 6) == ([tokenizer.decode([first]).strip()], [[first, second]])


def test_the_models_own_ends_still_end_an_answer(model):
    tokenizer = tiny_tokenizer()
    for configured, expected in ((None, [2]), (5, [2, 5]), ([7, 2], [2, 7])):
        model.generation_config.eos_token_id = configured
        assert end_tokens(model, tokenizer) == expected


def test_thoughts_are_no_part_of_the_texts_that_are_compared(model, prompts):
    tokenizer = tiny_tokenizer()
    whole, ids = generate_answers(model, tokenizer, prompts, 6)
    for prompt, answer in zip(prompts, ids, strict=True):
        for place, token in enumerate(answer[:-1]):
            mark = tokenizer.decode([token])
            if tokenizer(mark, add_special_tokens=False)["input_ids"] != [token]:
                continue
            (found,), same = generate_answers(model, tokenizer, [prompt], 6, form=PromptFormat(content_mark=mark))
            last = max(index for index, other in enumerate(answer) if other == token and place <= index)
            assert found == tokenizer.decode(answer[last + 1 :], skip_special_tokens=True).strip()
            assert same == [answer], "the tokens are all of them"
    assert generate_answers(model, tokenizer, prompts, 6, form=PromptFormat(content_mark="zzz"))[0] == whole
