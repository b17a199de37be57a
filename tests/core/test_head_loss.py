import pytest
import torch
import torch.nn.functional as F

from shadowtune.core import head_loss
from shadowtune.core.head_loss import head_cross_entropy

VOCABULARY, WIDTH = 13, 6


def example(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, generator=generator)
    x = torch.randn(rows, WIDTH, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[::3] = -100
    return weight, x, targets


def softcapped(weight):
    return lambda x: 3.0 * torch.tanh(x @ weight.T / 3.0)


@pytest.mark.parametrize("rows", [0, 1, 4, 63, 100])
@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_chunks_add_up_to_the_whole_with_its_gradient(rows, chunk, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    weight, x, targets = example(rows)
    loss = head_cross_entropy(softcapped(weight), x, targets, VOCABULARY)
    whole = F.cross_entropy(softcapped(weight)(x), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    ours, truth = (torch.autograd.grad(2.5 * value, x)[0] for value in (loss, whole))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    weight, x, targets = example(23)
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ weight.T

    head_cross_entropy(head, x, targets, VOCABULARY).backward()
    assert seen == [5, 5, 5, 5, 3]


def test_a_head_that_is_trained_gets_its_gradient():
    weight, x, targets = example(9)
    weight.requires_grad_()
    loss = head_cross_entropy(lambda rows: rows @ weight.T, x, targets, VOCABULARY, frozen=False)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_without_gradients_the_sum_is_the_same():
    weight, x, targets = example(9)
    with torch.no_grad():
        silent = head_cross_entropy(softcapped(weight), x, targets, VOCABULARY)
    loud = head_cross_entropy(softcapped(weight), x, targets, VOCABULARY)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loud.detach())


def test_16_bit_rows_are_summed_in_float32():
    weight, x, targets = example(50, torch.bfloat16)
    loss = head_cross_entropy(lambda rows: rows @ weight.T, x, targets, VOCABULARY)
    assert loss.dtype == torch.float32
    whole = F.cross_entropy((x @ weight.T).float(), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, whole)
    loss.backward()
    assert x.grad.dtype == torch.bfloat16
