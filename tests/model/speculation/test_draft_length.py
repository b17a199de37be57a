import itertools

import torch

from shadowtune.model.speculation.draft_length import Costs, DraftLength
from shadowtune.model.speculation.verification import SpeculationStatistics

CHEAP = Costs(draft=0.05, table=((1, 1.0), (2, 1.02)))


def drafted(length, confidence, rows=1, longest=8):
    """How many tokens a length policy drafts if every draft comes with this confidence."""
    survival, count = torch.ones(rows), 0
    for _ in range(length.begin(longest)):
        chances = length.chance(torch.full((rows,), confidence))
        if not length.worth(count, chances, survival):
            break
        survival = survival * chances
        count += 1
    return count


def learn(length, confidence, accepted, count):
    """A round of ``count`` drafts of which so many were accepted."""
    length.learn([torch.tensor([confidence])] * count, [accepted], accepted + 1, count)


def test_the_surer_the_drafter_the_longer_the_draft():
    counts = [drafted(DraftLength(CHEAP, 8), confidence) for confidence in (0.01, 0.3, 0.6, 0.99)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 8


def test_the_dearer_a_longer_pass_the_shorter_the_draft():
    dear = Costs(draft=0.05, table=((1, 1.0), (2, 1.4)))
    assert drafted(DraftLength(dear, 8), 0.7) < drafted(DraftLength(CHEAP, 8), 0.7)


def test_a_later_token_may_pay_for_one_that_does_not_by_itself():
    steps = Costs(draft=0.0, table=((1, 1.0), (2, 1.95), (8, 1.95)))
    assert drafted(DraftLength(steps, 3), 0.9) == 3
    assert drafted(DraftLength(steps, 1), 0.9) == 0


def test_a_boaster_is_believed_less_and_less():
    length = DraftLength(CHEAP, 8)
    before = float(length.chance(torch.tensor([0.95])))
    for _ in range(20):
        learn(length, 0.95, accepted=0, count=2)
    after = float(length.chance(torch.tensor([0.95])))
    assert before == torch.tensor(0.95)
    assert after < 0.2
    assert float(length.chance(torch.tensor([0.55]))) == torch.tensor(0.55)  # other levels are counted apart


def test_drafts_after_a_rejected_one_are_not_verified():
    length = DraftLength(CHEAP, 8)
    learn(length, 0.5, accepted=1, count=4)
    assert (sum(length.verified), sum(length.accepted)) == (2, 1)


def test_a_drafter_of_no_use_is_asked_ever_more_seldom_and_comes_back():
    length, asked = DraftLength(CHEAP, 4), []
    for turn in range(120):
        room = length.begin(4)
        asked.append(room > 0)
        length.learn([torch.tensor([0.9])] if room else [], [0], 1, int(room > 0))
        assert turn < 4 or not (asked[-1] and asked[-2])
    assert asked[:4] == [True] * 4
    attempts = [turn for turn, drafts in enumerate(asked) if drafts][3:]
    assert [later - earlier for earlier, later in itertools.pairwise(attempts)] == [9, 17, 33]
    while not length.begin(4):
        length.learn([], [0], 1, 0)
    length.learn([torch.tensor([0.9])], [1], 2, 1)
    assert length.begin(4) == 4


def test_a_fixed_length_asks_nothing():
    length = DraftLength(CHEAP, 3, fixed=True)
    for _ in range(10):
        assert drafted(length, 0.0) == 3
        learn(length, 0.0, accepted=0, count=3)


def test_sequences_of_a_batch_share_a_length():
    length = DraftLength(Costs(draft=0.0, table=((1, 1.0), (2, 1.5)), batch=1), 1)
    assert length.worth(0, torch.tensor([0.9, 0.9]), torch.ones(2))
    assert not length.worth(0, torch.tensor([0.9, 0.0]), torch.ones(2))


def test_costs_between_and_beyond_what_was_measured():
    costs = Costs.of("cpu", 0.05, batch=1)
    assert costs.pass_time(1) == 1.0
    assert all(costs.pass_time(n) < costs.pass_time(n + 1) for n in range(1, 200))
    batch = Costs.of("cpu", 0.05, batch=8)
    assert batch.pass_time(1) == 1.0
    assert batch.pass_time(4) > costs.pass_time(4)  # a processor that is busy with eight sequences has no time to spare
    assert Costs.of("cuda", 0.05, batch=8).pass_time(4) < 1.1


def test_statistics_are_by_index_in_the_draft():
    counts = SpeculationStatistics()
    counts.add(3, accepted=[3, 1], emitted=[4, 2])
    counts.add(1, accepted=[0], emitted=[1])
    assert (counts.passes, counts.emitted) == (3, 7)
    assert (counts.verified, counts.accepted) == ([3, 2, 1], [2, 1, 1])
    assert counts.acceptance_rates == [2 / 3, 1 / 2, 1.0]
    assert counts.tokens_per_pass == 7 / 3
    assert SpeculationStatistics().tokens_per_pass == 0.0
