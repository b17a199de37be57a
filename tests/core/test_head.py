import pytest
import torch

from shadowtune.core import reference
from shadowtune.core.head import Head, at_least_float32, head_sums_reference, summed_cross_entropy


def example():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    h, s = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    return weight, h, s, torch.tensor([3, -100, 0, 6, -100])


def test_sums_are_those_of_the_definitions():
    weight, h, s, targets = example()
    sums = head_sums_reference(Head(lambda x: x @ weight.T), h, s, targets, temperature=2.0)
    kept = targets != -100
    for ours, rows in ((sums.base, h), (sums.shadow, s)):
        logits = torch.cat([rows, rows[:1]])  # the reference shifts by one
        mean = reference.cross_entropy((logits @ weight.T)[None], torch.cat([targets[:1], targets])[None])
        torch.testing.assert_close(ours, 3 * mean)
    p, q = (torch.softmax(rows[kept] @ weight.T / 2.0, -1) for rows in (h, s))
    torch.testing.assert_close(sums.divergence, 4 * (p * (p / q).log()).sum())


def test_the_teacher_of_the_divergence_gets_no_gradient():
    weight, h, s, targets = example()
    divergence = head_sums_reference(Head(lambda x: x @ weight.T), h, s, targets, temperature=1.0).divergence
    to_h, to_s = torch.autograd.grad(divergence, (h, s), allow_unused=True)
    assert to_h is None or not to_h.any()
    assert to_s.abs().sum() > 0


def test_what_is_not_asked_for_is_none():
    weight, h, s, targets = example()
    head = Head(lambda x: x @ weight.T)
    assert head_sums_reference(head, h, None, targets, 1.0)[1:] == (None, None)
    assert head_sums_reference(head, h, s, targets).divergence is None


def test_cross_entropy_ignores_unlabelled_rows():
    logits = torch.tensor([[0.0, 0.0], [5.0, -5.0]])
    assert summed_cross_entropy(logits, torch.tensor([0, -100])).item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_at_least_float32(given, wide):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == wide
