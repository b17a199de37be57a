"""The tokens that a shadow drafts from."""

import pytest
import torch

from shadowtune import ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.training.training_data import frequent_tokens
from tests.support.shadows import perturbed_model, tokens


def test_it_is_saved_with_the_shadow(tmp_path):
    model = perturbed_model()
    model.set_draft_vocabulary(torch.tensor([3, 7, 50]))
    model.base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "shadow")
    loaded = ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "base"))
    assert torch.equal(loaded.draft_vocabulary, torch.tensor([3, 7, 50]))
    assert torch.equal(loaded(input_ids=tokens(1, 5)).logits, model(input_ids=tokens(1, 5)).logits)


@pytest.mark.parametrize("wrong", [[], [3, 97], [-1]])
def test_it_holds_tokens_of_the_base(wrong):
    with pytest.raises(ConfigError, match="a draft vocabulary is a list of token ids from 0 to 96"):
        perturbed_model().set_draft_vocabulary(torch.tensor(wrong, dtype=torch.long))


def test_it_is_the_most_frequent_labels():
    rows = [{"labels": [-100, 5, 5, 9]}, {"labels": [-100, -100, 5, 2, 9]}]
    assert frequent_tokens(rows, 2).tolist() == [5, 9]
    assert frequent_tokens(rows, 10).tolist() == [2, 5, 9]
