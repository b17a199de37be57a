import pytest
import torch

from shadowtune.core import losses as module
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import TopTokens, summed_cross_entropy, top_divergence, top_divergence_reference, top_tokens
from tests.core.test_linear_cross_entropy import example, head_of, softcap

K = 4


def by_definition(head, h, s, targets, k, temperature):
    """tau^2 KL, one row and one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for teacher, student, target in zip(head.apply(h.detach()).double(), head.apply(s).double(), targets, strict=True):
        if target < 0:
            continue
        best = sorted(range(len(teacher)), key=lambda token, row=teacher: -row[token].item())[:k]
        mass = sum((teacher[token] / temperature).exp() for token in best)
        normalizer = (student / temperature).exp().sum()
        for token in best:
            p = (teacher[token] / temperature).exp() / mass
            q = (student[token] / temperature).exp() / normalizer
            total = total + temperature**2 * p * (p / q).log()
    return total


@pytest.mark.parametrize("rows", [0, 1, 63])
@pytest.mark.parametrize("k", [1, K, 13])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("transform", [None, softcap], ids=["plain", "softcap"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_divergence_and_its_gradient_are_those_of_the_definition(rows, k, temperature, transform, biased):
    weight, bias, h, s, targets = example(rows)
    head = head_of(weight, bias if biased else None, transform)
    top = top_tokens(head, h, k, temperature)
    ours = top_divergence(head, s, targets, top, temperature)
    plain = top_divergence_reference(head, s, targets, top, temperature)
    truth = by_definition(head, h, s, targets, k, temperature)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain, truth, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(truth, s)[0] if truth.requires_grad else torch.zeros_like(s)
    for fast in (ours, plain):
        torch.testing.assert_close(torch.autograd.grad(fast, s)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_cross_entropy_that_is_known_is_used_at_temperature_1_alone(temperature, monkeypatch):
    weight, bias, h, s, targets = example(9)
    head = head_of(weight, bias)
    top = top_tokens(head, h, K, temperature)
    known = summed_cross_entropy(head.apply(s), targets)
    calls = []
    fused = module.fused_linear_cross_entropy
    monkeypatch.setattr(module, "fused_linear_cross_entropy", lambda *call: calls.append(call) or fused(*call))
    ours = top_divergence(head, s, targets, top, temperature, known)
    assert len(calls) == (0 if temperature == 1 else 1)
    truth = by_definition(head, h, s, targets, K, temperature)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(torch.autograd.grad(ours, s)[0], torch.autograd.grad(truth, s)[0])


def test_a_linear_head_is_not_applied_to_the_student():
    weight, _, h, s, targets = example(9)
    top = top_tokens(head_of(weight), h, K, 1.0)
    refusing = Head(lambda rows: pytest.fail("all logits were made"), weight)
    torch.testing.assert_close(
        top_divergence(refusing, s, targets, top, 1.0), by_definition(head_of(weight), h, s, targets, K, 1.0)
    )


def test_a_head_whose_weight_is_not_known_is_left_to_autograd():
    weight, _, h, s, targets = example(9)
    weight.requires_grad_()
    head = Head(lambda rows: rows @ weight.T)
    top_divergence(head, s, targets, top_tokens(head, h, K, 1.0), 1.0).backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_the_top_tokens_are_the_most_likely_ones_and_few_vectors_are_processed_at_once(at_once, monkeypatch):
    monkeypatch.setattr(module, "VECTORS_AT_ONCE", at_once)
    weight, bias, h, _, _ = example(9)
    sizes = []

    def apply(rows):
        sizes.append(len(rows))
        return rows @ weight.T + bias

    tokens, log_probabilities = top_tokens(Head(apply), h, K, 2.0)
    probabilities = torch.softmax((h @ weight.T + bias) / 2.0, -1)
    order = probabilities.argsort(-1, descending=True)[:, :K]
    chosen = probabilities.gather(1, order)
    assert torch.equal(tokens, order)
    torch.testing.assert_close(log_probabilities.exp(), chosen / chosen.sum(1, keepdim=True))
    assert not log_probabilities.requires_grad
    assert max(sizes) <= at_once
    assert sum(sizes) == 9


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_16_bit_rows_are_summed_in_float32(temperature):
    weight, bias, h, s, targets = example(50, torch.bfloat16)
    head = head_of(weight, bias)
    top = top_tokens(head, h, K, temperature)
    assert top.log_probabilities.dtype == torch.float32
    ours = top_divergence(head, s, targets, top, temperature)
    wide = head_of(weight.double(), bias.double())
    truth = top_divergence_reference(wide, s.double(), targets, top, temperature)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=1e-2)
    gradient = torch.autograd.grad(ours, s)[0]
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, torch.autograd.grad(truth, s)[0], rtol=3e-2, atol=3e-2)


def test_autocast_makes_the_products_in_its_dtype():
    weight, _, h, s, targets = example(9, torch.float32)
    head = head_of(weight)
    top = top_tokens(head, h, K, 1.0)
    exact = top_divergence(head, s, targets, top, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = top_divergence(head, s, targets, top, 1.0)
    assert rough != exact
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=2e-2)


def test_a_student_that_is_its_teacher_is_as_far_as_the_tokens_left_out():
    weight, _, h, _, targets = example(9)
    head = head_of(weight)
    kept = targets >= 0
    covered = torch.softmax(h @ weight.T, -1).topk(K).values.sum(1)
    ours = top_divergence(head, h, targets, top_tokens(head, h, K, 1.0), 1.0)
    torch.testing.assert_close(ours, -covered[kept].log().sum())


def test_compiled_it_is_the_same():
    weight, bias, h, s, targets = example(9)
    head = head_of(weight, bias)

    def compute(h, s, targets):
        return top_divergence(head, s, targets, TopTokens(*top_tokens(head, h, K, 2.0)), 2.0)

    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(h, s, targets), compute(h, s, targets))
