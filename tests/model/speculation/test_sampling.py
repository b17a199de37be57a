"""Sampling with drafts falls as sampling without."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.model.speculation.drafters import CombinedDrafter, ShadowDrafter
from shadowtune.model.speculation.verification import Proposal, verify_sequence
from tests.support.shadows import perturbed_model, tokens

DRAWS = 20_000


def chi_square(counts, probabilities):
    """Pearson's statistic over the classes that are expected at least 5 times, and the value it passes once in 1e6."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0, "an impossible token was drawn"
    likely = expected >= 5
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    return statistic, limit


@pytest.mark.parametrize("case", ["drawn", "drawn from some", "not drawn", "not drawn and impossible"])
def test_the_first_token_falls_as_the_model_says(case):
    """20,000 verifications of drafts from another distribution."""
    torch.manual_seed(3)
    logits = torch.randn(2, 12)
    logits[0, 5] = -torch.inf
    p = logits[0].softmax(-1).double()
    vocabulary = torch.tensor([1, 4, 5, 9]) if case == "drawn from some" else None
    q = torch.randn(1, 12 if vocabulary is None else 4).softmax(-1)
    counts, accepted = torch.zeros(12, dtype=torch.float64), 0
    columns = torch.multinomial(q[0], DRAWS, replacement=True)
    text = torch.zeros(4, dtype=torch.long)
    for column in columns:
        token = column if vocabulary is None else vocabulary[column]
        if case == "not drawn":
            proposal = Proposal(torch.tensor([7]), torch.ones(1))
        elif case == "not drawn and impossible":
            proposal = Proposal(torch.tensor([5]), torch.ones(1))
        else:
            proposal = Proposal(token[None], torch.ones(1), q, vocabulary)
        result = verify_sequence(text, 1, logits, 0, [proposal], lambda prefix, scores: scores, sample=True)
        counts[result.tokens[0]] += 1
        accepted += result.accepted
    statistic, limit = chi_square(counts, p)
    assert statistic < limit
    if case == "drawn":  # the accepted share is the overlap of p and q
        assert abs(accepted / len(columns) - float(torch.minimum(p, q[0].double()).sum())) < 0.02
    assert (accepted == 0) == (case == "not drawn and impossible")


@pytest.mark.parametrize(
    "speculate",
    [3, True, SpeculationConfig(length=3, drafter="ngram"), SpeculationConfig(length=3, drafter="combined")],
    ids=["fixed", "auto", "ngram", "combined"],
)
def test_answers_fall_as_the_model_says(speculate):
    """Answers of three tokens by a tiny model, against its own probabilities of them."""
    model = perturbed_model()
    model.set_draft_vocabulary(torch.arange(3, 60))
    prompt = tokens(1, 5)
    settings = {"do_sample": True, "top_k": 3, "temperature": 1.5, "max_new_tokens": 3, "eos_token_id": None}
    torch.manual_seed(11)
    count = 12_000 if speculate == 3 else 2_000
    rows = prompt.expand(count, -1)
    mask = torch.ones_like(rows)
    said = model.generate(input_ids=rows, attention_mask=mask, **settings, speculate=speculate)[:, 5:]
    assert said.shape == (count, 3)
    exact = {}
    with torch.no_grad():
        _walk(model, prompt, (), 1.0, exact)
    names = sorted(exact)
    counts = torch.zeros(len(names), dtype=torch.float64)
    for row in said.tolist():
        assert tuple(row) in exact, "an impossible answer was drawn"
        counts[names.index(tuple(row))] += 1
    statistic, limit = chi_square(counts, torch.tensor([exact[name] for name in names], dtype=torch.float64))
    assert statistic < limit


def _walk(model, prompt, said, chance, found):
    """Probabilities of all answers of three tokens."""
    if len(said) == 3:
        found[said] = chance
        return
    ids = torch.cat([prompt, torch.tensor([said], dtype=torch.long)], 1)
    scores = TopKLogitsWarper(3)(ids, model(input_ids=ids).logits[:, -1] / 1.5)
    p = scores.softmax(-1)[0]
    for token in p.nonzero()[:, 0].tolist():
        _walk(model, prompt, (*said, token), chance * float(p[token]), found)


def test_the_same_seed_gives_the_same_sample():
    model, ids = perturbed_model(), tokens(1, 9)
    said = []
    for _ in range(2):
        torch.manual_seed(5)
        said.append(model.generate(input_ids=ids, do_sample=True, max_new_tokens=20, speculate=True))
    assert torch.equal(*said)


def test_a_draft_vocabulary_holds_all_that_is_drafted():
    torch.manual_seed(0)
    weight, vocabulary = torch.randn(50, 8), torch.tensor([3, 17, 40])
    drafter = ShadowDrafter(Head(lambda x: x @ weight.T, weight), vocabulary, None)
    states = torch.randn(64, 8)
    proposal = drafter.propose(list, states)
    p = (states @ weight.T)[:, vocabulary].softmax(-1)
    assert torch.equal(proposal.tokens, vocabulary[p.argmax(-1)])
    torch.testing.assert_close(proposal.confidence, p.amax(-1))


def test_how_sure_a_drafter_is_does_not_depend_on_what_it_draws():
    """Or the decision to draft on would pick among the draws."""
    torch.manual_seed(0)
    weight = torch.randn(20, 8)
    head = Head(lambda x: x @ weight.T, weight)
    states = torch.randn(1, 8).expand(500, -1)
    for drafter in (ShadowDrafter(head, None, LogitsProcessorList()),):
        proposal = drafter.propose(list, states)
        assert len(proposal.tokens.unique()) > 1
        assert len(proposal.confidence.unique()) == 1
    combined = CombinedDrafter(ShadowDrafter(head, None, LogitsProcessorList()))
    proposal = combined.propose(lambda: [[1, 2, 3, 9, 1, 2, 3]] * 500, states)
    assert len(set(proposal.drawn.tolist())) == 1
