import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from shadowtune.errors import ShadowtuneError
from shadowtune.serving.edge.calibration import check_examples
from shadowtune.serving.edge.confidence import Signals
from shadowtune.serving.edge.risk import (
    binomial_cdf,
    controlled_threshold,
    mean_loss_p_value,
    rate_bound,
    sufficient_examples,
)
from shadowtune.serving.edge.thresholds import CalibrationExample, area, area_of, confidences, deferral_curve


def example(sure, edge, cloud=1.0):
    return CalibrationExample(Signals(sure, sure, sure, sure, 2), False, edge, cloud, 1.0)


def drawn(count, seed):
    """Confidence is the probability that the edge is right; the cloud is right in 95 %."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        sure = draw.random()
        rows.append(example(sure, float(draw.random() < sure), float(draw.random() < 0.95)))
    return rows


@pytest.mark.parametrize(("trials", "probability"), [(1, 0.3), (7, 0.5), (40, 0.02)])
def test_the_binomial_tail_is_the_sum_of_its_terms(trials, probability):
    for successes in range(trials + 1):
        terms = [
            math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(successes + 1)
        ]
        assert binomial_cdf(successes, trials, probability) == pytest.approx(sum(terms))


def test_the_bound_of_a_rate_is_the_one_at_which_so_few_are_unlikely():
    assert binomial_cdf(3, 50, rate_bound(3, 50, 0.01)) == pytest.approx(0.01, rel=1e-3)
    assert rate_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-3)
    assert rate_bound(0, 0, 0.05) == rate_bound(5, 5, 0.05) == pytest.approx(1.0)


@pytest.mark.parametrize("fractional", [False, True])
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(fractional):
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(2000):
        losses = (rng.random(80) < 0.1).astype(float)
        if fractional:
            losses = losses * rng.choice([0.4, 1.0, 1.6], 80).clip(max=1.0) / (2.4 / 3 / 0.8)
        rejected += mean_loss_p_value(losses, max(0.02, 0.1 if not fractional else 0.1 * np.mean([0.4, 1, 1]))) <= 0.05
    assert rejected / 2000 <= 0.065


def test_the_guarantee_holds_in_as_many_draws_as_is_stated():
    truth, broken, rates = drawn(40_000, -1), 0, []
    levels = np.array([each.signals.logprob for each in truth])
    losses = np.array([max(0.0, each.cloud_score - each.edge_score) for each in truth])
    for seed in range(100):
        rows = drawn(300, seed)
        point = controlled_threshold(rows, confidences(rows, "logprob"), 0.1, 0.05)
        broken += float(np.where(levels >= point.threshold, losses, 0.0).mean()) > 0.1
        rates.append(point.deferral_rate)
    assert broken <= 10  # 5 on average
    assert 0.4 < np.mean(rates) < 0.8  # of a loss of 0.1 at a rate of about 0.55


def test_too_few_rows_say_how_many_would_do():
    needed = sufficient_examples(0.02, 0.05)
    assert 0.98**needed <= 0.05 < 0.98 ** (needed - 1)
    rows = drawn(needed - 1, 0)
    with pytest.raises(ShadowtuneError, match=f"{2 * needed} examples in all would suffice"):
        controlled_threshold(rows, confidences(rows, "logprob"), 0.02, 0.05)
    rows = drawn(needed, 0)
    assert controlled_threshold(rows, confidences(rows, "logprob"), 0.02, 0.05).deferral_rate > 0.5


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([example(0.5, 1.0)] * 50, "better in 0 of 50 examples, .* about 2084 examples would suffice.*always-edge"),
        ([example(0.5, 0.0)] * 50, "no better in 0 of 50 examples, .*always-cloud"),
        ([example(0.5, 0.0)] * 4 + [example(0.5, 1.0)] * 96, "better in 4 of 100 examples, .* about 506 examples"),
    ],
)
def test_one_kind_alone_is_refused_with_the_rows_that_would_do(rows, said):
    with pytest.raises(ShadowtuneError, match=said):
        check_examples(rows[::2], rows[1::2], 5)
    check_examples(rows[::2], rows[1::2], 0)


def test_a_half_with_too_few_of_a_kind_is_refused_though_both_together_have_enough():
    better, other = example(0.5, 0.0), example(0.5, 1.0)
    with pytest.raises(ShadowtuneError, match=r"better in 10 of 100 examples, 3 in the half that chooses .* and 7 in"):
        check_examples([better] * 3 + [other] * 47, [better] * 7 + [other] * 43, 5)


@pytest.mark.parametrize(("found", "count"), [(3, 40), (1, 100), (30, 70)])
def test_as_many_rows_as_the_refusal_names_nearly_always_do(found, count):
    rows = [example(0.5, 0.0)] * found + [example(0.5, 1.0)] * (count - found)
    with pytest.raises(ShadowtuneError, match="about") as refused:
        check_examples(rows[::2], rows[1::2], 25)
    enough = int(re.search(r"about (\d+) examples", str(refused.value))[1])
    numbers = np.random.default_rng(0).binomial(enough // 2, found / count, (2000, 2)).min(1)
    assert 0.92 < (numbers >= 25).mean() < 0.99


def test_enough_of_both_kinds_pass():
    check_examples(*[[example(0.5, 0.0)] * 5 + [example(0.5, 1.0)] * 5] * 2, 5)


def test_the_fast_area_is_that_of_the_curve():
    rows = [replace(each, edge_score=each.edge_score / 2) for each in drawn(60, 3)]
    sure = [round(each.signals.logprob, 1) for each in rows]
    arrays = (np.array(sure), np.array([e.edge_score for e in rows]), np.array([e.cloud_score for e in rows]))
    assert area_of(*arrays) == pytest.approx(area(deferral_curve(rows, sure)))
