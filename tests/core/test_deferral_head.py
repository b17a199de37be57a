import pytest
import torch

from shadowtune.core.calibration_metrics import auroc, expected_calibration_error, reliability
from shadowtune.core.deferral_head import (
    DeferralHead,
    answer_log_odds,
    log_agreement,
    standardized_head,
    token_statistics,
)
from shadowtune.serving.edge.confidence import statistics_from_logits


def head(width=6):
    torch.manual_seed(0)
    return DeferralHead(torch.randn(2, width), torch.randn(2))


def test_a_head_folds_into_the_states_before_a_projection():
    wide, projection, z = head(8), torch.randn(8, 5), torch.randn(3, 7, 5)
    narrow = wide.folded(projection)
    assert narrow.width == 5
    torch.testing.assert_close(narrow.logits(z), wide.logits(z @ projection.T))


def test_standardized_weights_become_those_of_raw_states():
    inputs = 3 * torch.randn(40, 6 + 3).double() + 5
    mean, spread = torch.stack([inputs.mean(0)] * 2), torch.stack([inputs.std(0)] * 2)
    weight, bias = torch.randn(2, 9).double(), torch.randn(2).double()
    expected = ((inputs[:, None] - mean) / spread * weight).sum(-1) + bias
    head = standardized_head(weight, bias, mean, spread)
    found = head.with_statistics(head.logits(inputs[:, :6]), inputs[:, 6:])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_token_statistics_are_those_of_the_edge():
    logits, tokens = torch.randn(4, 9), torch.tensor([0, 3, 8, 3])
    for found, row, token in zip(token_statistics(logits, tokens), logits, tokens.tolist(), strict=True):
        expected = statistics_from_logits(row, token, 0)
        assert found.tolist() == pytest.approx([expected.logprob, expected.margin, expected.entropy], abs=1e-5)


def test_the_probabilities_of_an_answer():
    logits = torch.tensor([[0.5, 1.0], [-2.0, 2.0], [1.0, -0.5]])
    same = (1 - logits[:, 0].sigmoid()).prod()
    torch.testing.assert_close(log_agreement(logits).exp(), same)
    torch.testing.assert_close(answer_log_odds(logits), torch.tensor([2.5 / 3]))


def slow_auroc(scores, labels):
    pairs = [
        (a, b)
        for a, one in zip(scores, labels, strict=True)
        if one
        for b, two in zip(scores, labels, strict=True)
        if not two
    ]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("count", [2, 7, 60])
def test_auroc_counts_pairs(count):
    generator = torch.Generator().manual_seed(count)
    scores = (torch.rand(count, generator=generator) * 5).round().tolist()
    labels = [1.0, 0.0, *(torch.rand(count - 2, generator=generator) > 0.4).float().tolist()]
    assert auroc(scores, labels) == pytest.approx(slow_auroc(scores, labels))
    assert auroc(scores, [1.0] * count) == 0.5


def test_calibration_error_is_the_mean_distance_of_the_bins():
    sure, right = [0.05, 0.95, 0.95, 0.95, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0]
    low, high = reliability(sure, right)
    assert (low.count, high.count, high.accuracy) == (1, 4, 0.75)
    assert expected_calibration_error(sure, right) == pytest.approx((0.05 + 4 * (0.9625 - 0.75)) / 5)
    assert expected_calibration_error([], []) == 0
