"""Speculative decoding in batches: accepted drafts save passes, rejected ones change nothing."""

import pytest
import torch

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.verification import Proposal
from shadowtune.serving.engine import drafting
from tests.serving.engine.support import adapter, alone, answers, engine, one_model, prompt, request
from tests.support.bases import tiny_base

LENGTHS = (5, 9, 3)


class Oracle:
    """Proposes what each row will say, and something else at every ``wrong``-th token."""

    reads_states = True

    def __init__(self, texts, wrong):
        self.texts, self.wrong, self.learned = texts, wrong, []

    def propose(self, texts, states):
        assert states is not None
        said = texts()
        assert len(states) == len(said)
        tokens = []
        for text in said:
            whole = next(whole for whole in self.texts if whole[:3] == text[:3])
            right = whole[min(len(text), len(whole) - 1)]
            tokens.append((right + 1) % 97 if len(text) % self.wrong == 0 else right)
        return Proposal(torch.tensor(tokens), torch.full((len(tokens),), 0.9))

    def learn(self, hidden_states):
        self.learned.append(hidden_states)


@pytest.mark.parametrize("wrong", [2, 3, 1000])
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one", "three"])
def test_accepted_drafts_save_passes_in_every_sequence(monkeypatch, wrong, lengths):
    models = one_model()
    texts = [prompt(length) + alone(models["a"], prompt(length), 24) for length in lengths]
    monkeypatch.setattr(drafting, "make_drafter", lambda *arguments, **settings: Oracle(texts, wrong))
    requests = [request(length=length, max_tokens=24) for length in lengths]
    served = engine(models, speculation=SpeculationConfig(length=4))
    assert answers(served, requests) == [text[-24:] for text in texts]
    passes = served.counters()["passes"]
    if wrong == 1000:  # a pass for each prompt, and as many until the last has joined; from there on 5 tokens a pass
        assert passes <= 2 * len(lengths) - 1 + -(-23 // 5)
        assert served.counters()["accepted_draft_tokens"] == served.counters()["verified_draft_tokens"]
    assert passes < 24


def test_only_sequences_with_speculation_get_drafts(monkeypatch):
    models = one_model()
    asked = []

    class Counting(Oracle):
        def propose(self, texts, states):
            asked.append(len(texts()))
            return super().propose(texts, states)

    texts = [prompt(length) + alone(models["a"], prompt(length), 12) for length in LENGTHS]
    monkeypatch.setattr(drafting, "make_drafter", lambda *arguments, **settings: Counting(texts, 3))
    requests = [request(length=length, speculate=length == 5) for length in LENGTHS]
    served = engine(models, speculation=SpeculationConfig(length=2))
    assert answers(served, requests) == [text[-12:] for text in texts]
    assert set(asked) == {1}


def test_a_drafter_that_is_never_right_is_soon_not_asked(monkeypatch):
    models = one_model()
    texts = [prompt(5) + alone(models["a"], prompt(5), 60)]
    oracle = Oracle(texts, 1)
    proposals = []
    propose = oracle.propose
    monkeypatch.setattr(oracle, "propose", lambda *given: proposals.append(given) or propose(*given))
    monkeypatch.setattr(drafting, "make_drafter", lambda *arguments, **settings: oracle)
    served = engine(models, speculation=SpeculationConfig())
    assert answers(served, [request(max_tokens=60)]) == [texts[0][-60:]]
    assert len(proposals) < 30


def test_large_batches_on_a_cpu_need_better_drafts():
    """What one more token costs in the verifying pass grows with the rows of the batch."""
    length = drafting.DraftLength(drafting.Costs.of("cpu", 0.05, 1), 8)
    chances = torch.tensor([0.6])
    assert length.worth(0, chances, torch.ones(1))
    length.costs = drafting.Costs.of("cpu", 0.05, 16)
    others = torch.zeros(15)
    assert not length.worth(0, torch.cat([chances, others]), torch.cat([torch.ones(1), others]))


@pytest.mark.parametrize("layers", [None, (1, -1)])
def test_a_draft_head_sees_the_state_that_chose_the_last_token(layers, monkeypatch):
    """The drafter is told each row's own, whichever rows there are."""
    base = tiny_base()
    models = {"a": adapter(base, draft_rank=4, draft_layers=layers)}
    learned = []
    learn = drafting.make_drafter

    def watched(*arguments, **settings):
        drafter = learn(*arguments, **settings)
        monkeypatch.setattr(drafter, "learn", lambda states: learned.append(states))
        return drafter

    monkeypatch.setattr(drafting, "make_drafter", watched)
    served = engine(models, speculation=SpeculationConfig(length=2, drafter="draft_head"))
    assert answers(served, [request(length=5)]) == [alone(models["a"], prompt(5))]
    said = alone(models["a"], prompt(5))
    with torch.no_grad():
        hidden = models["a"](torch.tensor([prompt(5) + said])).draft_features[0]
    assert len(learned) > 3
    for state in learned:
        distance = (hidden[4:] - state[0]).abs().amax(-1)
        assert distance.min() < 1e-4
    torch.testing.assert_close(learned[0][0], hidden[4], rtol=1e-3, atol=1e-4)


def test_a_draft_head_that_was_not_trained_is_refused():
    with pytest.raises(ConfigError, match="draft_rank"):
        engine(one_model(), speculation=SpeculationConfig(drafter="draft_head"))


def test_draft_heads_that_read_different_blocks_share_a_batch():
    base = tiny_base()
    models = {
        "a": adapter(base, 1, draft_rank=4, draft_layers=(1, -1)),
        "b": adapter(base, 2, draft_rank=5, draft_layers=(2,)),
        "c": adapter(base, 3, draft_rank=3),
    }
    requests = [request(model, 5 + index) for index, model in enumerate([*models, *models])]
    served = engine(models, speculation=SpeculationConfig(length=2, drafter="draft_head"))
    assert answers(served, requests) == [alone(models[each.model], each.prompt) for each in requests]
    assert served.counters()["verified_draft_tokens"] > 0
