import pytest
import torch

from shadowtune.core import vocabulary_sweep
from shadowtune.core.head import Head, head_sums_reference
from shadowtune.core.losses import head_sums

VOCABULARY, WIDTH = 13, 6


def softcap(logits):
    return 3.0 * torch.tanh(logits / 3.0)


def head_of(weight, bias=None, finish=None):
    def apply(x):
        logits = x @ weight.T if bias is None else x @ weight.T + bias
        return logits if finish is None else finish(logits)

    return Head(apply, weight, bias, finish)


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
@pytest.mark.parametrize("finish", [None, softcap], ids=["plain", "softcap"])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_and_gradients_equal_those_of_all_logits(rows, columns, temperature, finish, biased, monkeypatch):
    monkeypatch.setattr(vocabulary_sweep, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(vocabulary_sweep, "NARROWEST_TILE", columns)
    weight, bias, h, s, targets = example(rows)
    head = head_of(weight, bias if biased else None, finish)
    swept = head_sums(head, h, s, targets, temperature)
    truth = head_sums_reference(head, h, s, targets, temperature)
    for ours, slow in zip(swept, truth, strict=True):
        assert (ours is None) == (slow is None)
        if slow is not None:
            torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-11)
    for ours, slow in zip(gradients(swept, h, s), gradients(truth, h, s), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("columns", [4, 13])
def test_one_network_alone(columns, monkeypatch):
    monkeypatch.setattr(vocabulary_sweep, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(vocabulary_sweep, "NARROWEST_TILE", columns)
    weight, _, h, s, targets = example(9)
    swept, truth = (compute(head_of(weight), h, None, targets) for compute in (head_sums, head_sums_reference))
    assert swept[1:] == truth[1:] == (None, None)
    torch.testing.assert_close(swept.base, truth.base)
    torch.testing.assert_close(gradients(swept, h, s)[0], gradients(truth, h, s)[0])


def test_the_divergence_moves_the_shadow_alone():
    weight, _, h, s, targets = example(9)
    divergence = head_sums(head_of(weight), h, s, targets, 1.0).divergence
    to_h, to_s = torch.autograd.grad(divergence, (h, s))
    assert not to_h.any()
    assert to_s[targets >= 0].abs().sum() > 0
    assert not to_s[targets < 0].any()


def test_a_tile_holds_no_more_logits_than_it_may(monkeypatch):
    monkeypatch.setattr(vocabulary_sweep, "TILE_ELEMENTS", {"cpu": 5 * 18})
    monkeypatch.setattr(vocabulary_sweep, "NARROWEST_TILE", 1)
    weight, _, h, s, targets = example(9)
    seen = []

    def finish(logits):
        seen.append(tuple(logits.shape))
        return logits * 1.0

    head_sums(head_of(weight, finish=finish), h, s, targets)
    assert seen == [(18, 5), (18, 5), (18, 3), (18, 1)]  # the last are the targets' own logits


def test_large_logits_do_not_overflow():
    weight, _, h, s, targets = example(9, torch.float32)
    head = head_of(300 * weight)
    swept, truth = (compute(head, h, s, targets, 1.0) for compute in (head_sums, head_sums_reference))
    for ours, slow in zip(swept, truth, strict=True):
        torch.testing.assert_close(ours, slow)


def test_without_gradients_the_sums_are_the_same():
    weight, _, h, s, targets = example(9)
    with torch.no_grad():
        silent = head_sums(head_of(weight), h, s, targets, 1.0)
    loud = head_sums(head_of(weight), h, s, targets, 1.0)
    assert not any(term.requires_grad for term in silent)
    torch.testing.assert_close(torch.stack(silent), torch.stack(loud).detach())


def test_16_bit_rows_are_summed_in_float32():
    weight, _, h, s, targets = example(50, torch.bfloat16)
    head = head_of(weight)
    swept, truth = (compute(head, h, s, targets, 1.0) for compute in (head_sums, head_sums_reference))
    assert {term.dtype for term in swept} == {torch.float32}
    for ours, slow in zip(swept, truth, strict=True):
        torch.testing.assert_close(ours, slow, rtol=2e-2, atol=2e-2)
    for ours, slow in zip(gradients(swept, h, s), gradients(truth, h, s), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, slow, rtol=5e-2, atol=5e-2)


def test_autocast_makes_the_products_in_its_dtype():
    weight, _, h, s, targets = example(9, torch.float32)
    exact = head_sums(head_of(weight), h, s, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head_sums(head_of(weight), h, s, targets)
    assert rough.base != exact.base
    torch.testing.assert_close(rough.base, exact.base, rtol=2e-2, atol=2e-2)


def test_a_head_whose_weight_is_not_known_is_left_to_autograd():
    weight, _, h, s, targets = example(9)
    weight.requires_grad_()
    head_sums(Head(lambda rows: rows @ weight.T), h, s, targets).base.backward()
    assert weight.grad.abs().sum() > 0
