"""The tokens that a shadow drafts from."""

import pytest
import torch

from shadowtune import ShadowForCausalLM
from shadowtune.core.draft_head import unrolled_proposals
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


def test_the_draft_head_learns_those_tokens_alone():
    """Its loss is over the columns of the vocabulary; other labels count in the mean, with a loss of 0."""
    model, ids = perturbed_model(draft_rank=4, draft_steps=1, dropout=0.0).train(), tokens(1, 9)
    drafted = ids[0, 2:5].unique()
    model.set_draft_vocabulary(drafted)
    output = model(input_ids=ids, labels=ids)
    with torch.no_grad():
        features, s = model.eval()(ids).draft_features, model.encode(ids)[1].initial
        z = unrolled_proposals(model.shadow.draft_head, features, s, 1)[0][0, :-1]
        log_probabilities = (z @ model.head.weight[drafted].T).log_softmax(-1)
    losses = [-log_probabilities[at][drafted == token] for at, token in enumerate(ids[0, 1:])]
    torch.testing.assert_close(output.draft_loss, torch.cat(losses).sum() / 8)
