"""Trees of drafts against plain decoding, token by token."""

import pytest
import torch

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.model.speculation import decoding
from shadowtune.model.speculation.decoding import Speculator
from shadowtune.model.speculation.tree import DraftTree
from shadowtune.model.speculation.verification import Proposal, verify_greedy, verify_sequence
from tests.model.speculation.test_decoding import left_padded, one
from tests.support.shadows import perturbed_model, tokens


class WrongButClose:
    """Drafts a wrong token at every ``wrong``-th position, where the right one is its second alternative."""

    reads_states = True

    def __init__(self, answers, wrong):
        self.answers, self.wrong = answers, wrong

    def propose(self, texts, states):
        rows = texts()
        at = [min(len(text), self.answers.shape[1] - 1) for text in rows]
        right = torch.stack([self.answers[row, index] for row, index in enumerate(at)])
        off = torch.tensor([(index + row) % self.wrong == 0 for row, index in enumerate(at)])
        drafted = torch.where(off, (right + 1) % 97, right)
        others = torch.stack([(right + 2) % 97, right], 1)
        return Proposal(drafted, torch.full((len(rows),), 0.9), alternatives=others)

    def learn(self, features):
        pass


@pytest.mark.parametrize("wrong", [1, 2, 3])
@pytest.mark.parametrize("inputs", [one(), left_padded()], ids=["one", "padded"])
@pytest.mark.parametrize("settings", [{}, {"variant": "stateless", "alpha": 0.02}], ids=["paper", "stateless"])
def test_a_chosen_alternative_gives_a_token_more_and_stays_in_the_cache(wrong, inputs, settings, monkeypatch):
    model = perturbed_model(**settings)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(decoding, "make_drafter", lambda *arguments: WrongButClose(plain, wrong))
    speculator = Speculator(SpeculationConfig(length=4, branches=3))
    drafted = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, custom_generate=speculator
    )
    assert torch.equal(drafted, plain)
    if len(plain) == 1:  # each pass gives the chosen alternative and one token more, but for the last
        assert speculator.statistics.tokens_per_pass > 1.9


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "opt", "phi3", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_kind_of_base(model_type, attention):
    model, inputs = perturbed_model(model_type), left_padded()
    model.set_attn_implementation(attention)
    settings = {**inputs, "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**settings)
    assert torch.equal(model.generate(**settings, speculate=SpeculationConfig(length=3, branches=3)), plain)


@pytest.mark.parametrize("settings", [{"return_dict_in_generate": True}, {"cache_implementation": "static"}])
def test_where_slots_count_a_chain_is_drafted(settings):
    model = perturbed_model()
    inputs = {**one(), "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    plain = model.generate(**inputs)
    with pytest.warns(UserWarning, match="drafting a chain in place of a tree of 3 branches: its cache counts slots"):
        output = model.generate(**inputs, **settings, speculate=SpeculationConfig(length=2, branches=3))
    assert torch.equal(output.sequences if "return_dict_in_generate" in settings else output, plain)


def test_every_node_sees_its_ancestors():
    tree = DraftTree(2, 2, torch.device("cpu"))
    assert tree.depths.tolist() == [0, 1, 2, 1, 1, 2, 2]

    network = perturbed_model().base
    past = torch.tensor([[0, 1], [1, 1]])
    mask = tree.mask(0, past, 2, network).squeeze(1).long()
    assert mask.shape == (2, 7, 9)
    assert mask[0, :, :2].unique(dim=0).tolist() == [[0, 1]]
    ancestors = [[0], [0, 1], [0, 1, 2], [0, 3], [0, 4], [0, 1, 5], [0, 1, 6]]
    assert [row.nonzero().flatten().tolist() for row in mask[1, :, 2:]] == ancestors
    assert torch.equal(tree.mask(3, past, 2, network).squeeze(1).long(), mask[:, 3:])


def test_sampling_a_tree_falls_as_the_model_says():
    """The first two tokens of 6,000 verifications: the first by p, the second by p of the chosen node."""
    torch.manual_seed(5)
    logits = torch.randn(4, 8)  # the last token, one draft, its two alternatives
    q = torch.randn(1, 8).softmax(-1)
    text, counts, branched = torch.zeros(5, dtype=torch.long), torch.zeros(8, 8, dtype=torch.float64), 0
    expected = logits[0].softmax(-1).double()
    second = logits.softmax(-1).double()
    for column in torch.multinomial(q[0], 6_000, replacement=True):
        likely = (expected - q[0]).argsort(descending=True).tolist()  # where the rejection sampler goes
        others = torch.tensor([[token for token in likely if token != column][:2]])
        proposal = Proposal(column[None], torch.ones(1), q, alternatives=others)
        result = verify_sequence(text, 1, logits, 0, [proposal], lambda prefix, scores: scores, sample=True)
        branched += result.branch is not None
        if len(result.tokens) == 2:
            node = 1 if result.branch is None else 2 + result.branch
            counts[node, result.tokens[1]] += 1
        counts[0, result.tokens[0]] += 1
    assert branched > 300
    for node in range(4):
        wanted = (expected if node == 0 else second[node]) * counts[node].sum()
        statistic = float(((counts[node] - wanted) ** 2 / wanted).sum())
        assert statistic < 45, f"node {node}: chi-square with 7 degrees of freedom exceeds 45 once in 1e7"


@pytest.mark.parametrize("processed", [False, True])
def test_greedy_verification_of_a_tree(processed):
    """Of both implementations: the chain as far as it is right, then the alternative, then its own next token."""
    chosen = torch.tensor([4, 9, 1, 2, 3, 5, 6])  # after the last token, two drafts, and two alternatives of each
    logits = torch.nn.functional.one_hot(chosen, 12).float()
    for drafts, others, expected in [
        ([4, 9], [[0, 0], [0, 0]], ([4, 9, 1], 2, None)),
        ([4, 0], [[0, 0], [7, 9]], ([4, 9, 6], 1, 1)),
        ([8, 0], [[4, 0], [7, 9]], ([4, 2], 0, 0)),
        ([8, 0], [[5, 0], [7, 9]], ([4], 0, None)),
    ]:
        if processed:
            proposals = [
                Proposal(torch.tensor([draft]), torch.ones(1), alternatives=torch.tensor([other]))
                for draft, other in zip(drafts, others, strict=True)
            ]
            space = torch.zeros(9, dtype=torch.long)
            result = verify_sequence(space, 1, logits, 0, proposals, lambda prefix, scores: scores, sample=False)
        else:
            result = verify_greedy(logits[None], torch.tensor([drafts]), torch.tensor([others]))[0]
        assert tuple(result) == expected


def test_tokens_behind_the_end_of_a_sequence_are_no_error():
    """A sequence with little room beside one with much: drafts behind its end are verified, and dropped."""
    logits = torch.nn.functional.one_hot(torch.tensor([4, 5, 6, 7]), 12).float()
    proposals = [Proposal(torch.tensor([token]), torch.ones(1)) for token in (4, 5, 6)]
    space = torch.zeros(3, dtype=torch.long)
    result = verify_sequence(space, 2, logits, 0, proposals, lambda prefix, scores: scores, sample=False)
    assert (result.tokens[:1], space.tolist()) == ([4], [0, 0, 4])


@pytest.mark.parametrize("speculate", [SpeculationConfig(length=2, branches=3)])
def test_samples_of_a_tree_have_the_models_own_frequencies(speculate):
    """Answers of two tokens by a tiny model, against its own probabilities of them."""
    model, prompt, count = perturbed_model(), tokens(1, 5), 3000
    settings = {"do_sample": True, "top_k": 3, "temperature": 1.5, "max_new_tokens": 2, "eos_token_id": None}
    torch.manual_seed(11)
    rows = prompt.expand(count, -1)
    said = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **settings, speculate=speculate)[:, 5:]
    with torch.no_grad():
        first = _top3(model(prompt).logits[0, -1])
        exact = {
            (token, follower): p * following
            for token, p in first.items()
            for follower, following in _top3(
                model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, -1]
            ).items()
        }
    told = [tuple(row) for row in said.tolist()]
    assert set(told) <= set(exact)
    statistic = sum((told.count(pair) - count * p) ** 2 / (count * p) for pair, p in exact.items() if count * p >= 5)
    assert statistic < 47, "chi-square with 8 degrees of freedom exceeds 47 once in 1e7"


def _joined(prompt, token):
    return torch.cat([prompt, torch.tensor([[token]])], 1)


def _top3(logits):
    best = logits.topk(3)
    return dict(zip(best.indices.tolist(), (best.values / 1.5).softmax(-1).tolist(), strict=True))
