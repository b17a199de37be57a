import pytest
import torch

from shadowtune.core import reference
from shadowtune.core.kernels import linear_cross_entropy as kernel
from shadowtune.core.kernels.linear_cross_entropy import Head, at_least_float32
from shadowtune.core.losses import linear_cross_entropy, linear_cross_entropy_reference, summed_cross_entropy

VOCABULARY, WIDTH = 13, 6


def softcap(logits):
    return 3.0 * torch.tanh(logits / 3.0)


def head_of(weight, bias=None, transform=None):
    def apply(x):
        logits = x @ weight.T if bias is None else x @ weight.T + bias
        return logits if transform is None else transform(logits)

    return Head(apply, weight, bias, transform)


def example(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(VOCABULARY, WIDTH + 1, dtype=dtype, generator=generator).split([WIDTH, 1], 1)
    h, s = (torch.randn(rows, WIDTH, dtype=dtype, generator=generator).requires_grad_() for _ in range(2))
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[::3] = -100
    return weight, bias[:, 0], h, s, targets


def gradients(sums, h, s):
    """Of a sum in which each term has a factor of its own."""
    total = sum(factor * term for factor, term in zip((2.5, 0.3, 1.7), sums, strict=True) if term is not None)
    return torch.autograd.grad(total, (h, s), allow_unused=True)


@pytest.mark.parametrize("rows", [0, 1, 63, 100])
@pytest.mark.parametrize("columns", [1, 5, 13])
@pytest.mark.parametrize("temperature", [None, 1.0, 2.5])
@pytest.mark.parametrize("transform", [None, softcap], ids=["plain", "softcap"])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_and_gradients_equal_those_of_all_logits(rows, columns, temperature, transform, biased, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(kernel, "NARROWEST_TILE", columns)
    weight, bias, h, s, targets = example(rows)
    head = head_of(weight, bias if biased else None, transform)
    fused = linear_cross_entropy(head, h, s, targets, temperature)
    truth = linear_cross_entropy_reference(head, h, s, targets, temperature)
    for ours, slow in zip(fused, truth, strict=True):
        assert (ours is None) == (slow is None)
        if slow is not None:
            torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-11)
    for ours, slow in zip(gradients(fused, h, s), gradients(truth, h, s), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("columns", [4, 13])
def test_one_network_alone(columns, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(kernel, "NARROWEST_TILE", columns)
    weight, _, h, s, targets = example(9)
    fused, truth = (
        compute(head_of(weight), h, None, targets) for compute in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert fused[1:] == truth[1:] == (None, None)
    torch.testing.assert_close(fused.base, truth.base)
    torch.testing.assert_close(gradients(fused, h, s)[0], gradients(truth, h, s)[0])


def test_the_divergence_moves_the_shadow_alone():
    weight, _, h, s, targets = example(9)
    divergence = linear_cross_entropy(head_of(weight), h, s, targets, 1.0).divergence
    to_h, to_s = torch.autograd.grad(divergence, (h, s))
    assert not to_h.any()
    assert to_s[targets >= 0].abs().sum() > 0
    assert not to_s[targets < 0].any()


def test_a_tile_holds_no_more_logits_than_it_may(monkeypatch):
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", {"cpu": 5 * 18})
    monkeypatch.setattr(kernel, "NARROWEST_TILE", 1)
    weight, _, h, s, targets = example(9)
    seen = []

    def transform(logits):
        seen.append(tuple(logits.shape))
        return logits * 1.0

    linear_cross_entropy(head_of(weight, transform=transform), h, s, targets)
    assert seen == [(18, 5), (18, 5), (18, 3), (18, 1)]  # the last are the targets' own logits


def test_large_logits_do_not_overflow():
    weight, _, h, s, targets = example(9, torch.float32)
    head = head_of(300 * weight)
    fused, truth = (
        compute(head, h, s, targets, 1.0) for compute in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    for ours, slow in zip(fused, truth, strict=True):
        torch.testing.assert_close(ours, slow)


def test_without_gradients_the_sums_are_the_same():
    weight, _, h, s, targets = example(9)
    with torch.no_grad():
        silent = linear_cross_entropy(head_of(weight), h, s, targets, 1.0)
    loud = linear_cross_entropy(head_of(weight), h, s, targets, 1.0)
    assert not any(term.requires_grad for term in silent)
    torch.testing.assert_close(torch.stack(silent), torch.stack(loud).detach())


def test_16_bit_rows_are_summed_in_float32():
    weight, _, h, s, targets = example(50, torch.bfloat16)
    head = head_of(weight)
    fused, truth = (
        compute(head, h, s, targets, 1.0) for compute in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert {term.dtype for term in fused} == {torch.float32}
    for ours, slow in zip(fused, truth, strict=True):
        torch.testing.assert_close(ours, slow, rtol=2e-2, atol=2e-2)
    for ours, slow in zip(gradients(fused, h, s), gradients(truth, h, s), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, slow, rtol=5e-2, atol=5e-2)


def test_autocast_makes_the_products_in_its_dtype():
    weight, _, h, s, targets = example(9, torch.float32)
    exact = linear_cross_entropy(head_of(weight), h, s, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(head_of(weight), h, s, targets)
    assert rough.base != exact.base
    torch.testing.assert_close(rough.base, exact.base, rtol=2e-2, atol=2e-2)


def test_a_head_whose_weight_is_not_known_is_left_to_autograd():
    weight, _, h, s, targets = example(9)
    weight.requires_grad_()
    linear_cross_entropy(Head(lambda rows: rows @ weight.T), h, s, targets).base.backward()
    assert weight.grad.abs().sum() > 0


# The reference implementation.


def small_example():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    h, s = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    return weight, h, s, torch.tensor([3, -100, 0, 6, -100])


def test_sums_are_those_of_the_definitions():
    weight, h, s, targets = small_example()
    sums = linear_cross_entropy_reference(Head(lambda x: x @ weight.T), h, s, targets, temperature=2.0)
    kept = targets != -100
    for ours, rows in ((sums.base, h), (sums.shadow, s)):
        logits = torch.cat([rows, rows[:1]])  # the reference shifts by one
        mean = reference.cross_entropy((logits @ weight.T)[None], torch.cat([targets[:1], targets])[None])
        torch.testing.assert_close(ours, 3 * mean)
    p, q = (torch.softmax(rows[kept] @ weight.T / 2.0, -1) for rows in (h, s))
    torch.testing.assert_close(sums.divergence, 4 * (p * (p / q).log()).sum())


def test_the_teacher_of_the_divergence_gets_no_gradient():
    weight, h, s, targets = small_example()
    divergence = linear_cross_entropy_reference(Head(lambda x: x @ weight.T), h, s, targets, temperature=1.0).divergence
    to_h, to_s = torch.autograd.grad(divergence, (h, s), allow_unused=True)
    assert to_h is None or not to_h.any()
    assert to_s.abs().sum() > 0


def test_what_is_not_asked_for_is_none():
    weight, h, s, targets = small_example()
    head = Head(lambda x: x @ weight.T)
    assert linear_cross_entropy_reference(head, h, None, targets, 1.0)[1:] == (None, None)
    assert linear_cross_entropy_reference(head, h, s, targets).divergence is None


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
