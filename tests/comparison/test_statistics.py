import math

import pytest
import torch

from shadowtune.comparison.statistics import MeanEstimate, bootstrap, mean_of


def alternating(count, share):
    """Scores of which ``share`` are 1, shuffled the same way each time."""
    scores = (torch.arange(count) < share * count).double()
    return scores[torch.randperm(count, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_interval_of_a_share_is_that_of_the_normal_distribution(share):
    scores = alternating(1000, share)
    estimate = bootstrap(scores[None]).estimate()
    half = 1.96 * math.sqrt(share * (1 - share) / 1000)
    assert estimate.mean == pytest.approx(share)
    assert estimate.low == pytest.approx(share - half, abs=0.12 * half)
    assert estimate.high == pytest.approx(share + half, abs=0.12 * half)


def test_replicates_have_the_spread_of_examples_and_seeds_together():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.3, 0.5, 0.7])[:, None] + 0.5 * torch.randn(3, 400, generator=generator)
    found = bootstrap(scores, replicates=20_000).replicates
    by_example = scores.double().mean(0).var(correction=0) / 400
    by_seed = scores.double().mean(1).var(correction=0) / 3
    within = scores.double().var(1, correction=0).mean() / 400
    # Var = Var(seeds) + Var(examples of a draw of seeds): that draw holds less than all three seeds on average
    low, high = by_seed + by_example, by_seed + within
    assert float(low) * 0.95 < float(found.var()) < float(high) * 1.05
    assert float(found.var()) > 5 * float(by_example)


def test_equal_seeds_add_no_spread():
    scores = alternating(300, 0.4)
    one, three = bootstrap(scores[None]), bootstrap(scores.expand(3, -1))
    assert torch.allclose(one.replicates, three.replicates)


def test_a_paired_difference_is_sure_where_the_parts_are_not():
    theirs = alternating(300, 0.5)
    ours = theirs.clone()
    ours[(theirs == 0).nonzero()[:12, 0]] = 1  # the same answers, and twelve more right ones
    a, b = bootstrap(ours[None]), bootstrap(theirs[None])
    assert a.estimate().low < b.estimate().high
    estimate = a.minus(b).estimate()
    assert estimate.mean == pytest.approx(12 / 300)
    half = 1.96 * math.sqrt(12 / 300 * (1 - 12 / 300) / 300)
    assert estimate.low == pytest.approx(12 / 300 - half, abs=0.2 * half)
    assert estimate.outcome == "better"
    assert b.minus(a).estimate().outcome == "worse"


def test_another_stream_draws_other_examples():
    scores = alternating(300, 0.4)[None]
    assert torch.equal(bootstrap(scores, 5).replicates, bootstrap(scores, 5).replicates)
    assert not torch.equal(bootstrap(scores, 5).replicates, bootstrap(scores, 6).replicates)


def test_the_mean_over_tasks_counts_each_task_the_same_and_is_surer():
    tasks = [bootstrap(alternating(400, share)[None], stream) for stream, share in enumerate((0.4, 0.6))]
    both = mean_of(tasks)
    assert both.mean == pytest.approx(0.5)
    half = 1.96 * math.sqrt(2 * 0.24 / 400) / 2
    estimate = both.estimate()
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.1, "undecided"), (0, 0, "undecided")],
)
def test_an_interval_that_holds_zero_decides_nothing(low, high, verdict):
    assert MeanEstimate(0.0, low, high).outcome == verdict


@pytest.mark.parametrize("count", [1, 16, 300])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_right_has_an_exact_interval_and_not_one_of_no_width(count, share):
    estimate = bootstrap(torch.full((3, count), share)).estimate()
    other = 1 - 0.025 ** (1 / count)
    expected = (0.0, other) if share == 0 else (1 - other, 1.0)
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_equal_scores_between_0_and_1_have_an_interval_too():
    estimate = bootstrap(torch.full((1, 10), 0.5)).estimate()
    assert estimate.low < 0.3 < 0.7 < estimate.high


@pytest.mark.parametrize(("count", "verdict"), [(1, "undecided"), (5, "undecided"), (6, "better"), (16, "better")])
def test_all_against_none_is_decided_as_by_a_sign_test(count, verdict):
    ours, theirs = bootstrap(torch.ones(1, count)), bootstrap(torch.zeros(1, count))
    assert ours.minus(theirs).estimate().outcome == verdict


def test_methods_that_answered_alike_differ_by_no_more_than_rows_can_tell():
    scores = alternating(100, 0.5)
    estimate = bootstrap(scores[None]).minus(bootstrap(scores[None])).estimate()
    assert estimate.mean == 0
    assert (estimate.low, estimate.high) == pytest.approx((-(1 - 0.025**0.01), 1 - 0.025**0.01))


def test_a_mean_over_tasks_keeps_what_a_task_without_spread_is_unsure_of():
    wide, sure = bootstrap(torch.ones(1, 10)), bootstrap(torch.ones(1, 10_000))
    assert mean_of([wide, wide]).estimate().low < mean_of([sure, sure]).estimate().low < 1
