import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core import reference
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import (
    LossWeights,
    detached_causal_loss,
    joint_causal_loss,
    relative_squared_error,
    shift_and_select,
    token_cross_entropy,
    top_tokens,
)

VOCABULARY, WIDTH = 11, 6


def linear(weight: Tensor) -> Head:
    return Head(lambda x: x @ weight.T, weight)


def example(rows: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head (V, d), hidden states and s0 (B, T, d), labels (B, T) of which some are ignored, the first column too."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator)
    h, s = torch.randn(2, rows, length, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[0] = -100
    labels[1, 0] = 3
    return head, h.requires_grad_(), s.requires_grad_(), labels


def test_labelled_positions_are_shifted_and_in_order():
    labels = torch.tensor([[5, -100, 7], [-100, -100, -100], [-100, 8, 9]])
    hidden = torch.arange(9.0).view(3, 3, 1)
    targets, rows = shift_and_select(labels, hidden)
    assert targets.tolist() == [7, 8, 9]
    assert rows.flatten().tolist() == [1.0, 6.0, 7.0]


@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_joint_loss_and_its_gradients_equal_the_reference(weight):
    head, h, s, labels = example()
    total, base, shadow, *_ = joint_causal_loss(linear(head), h, s, labels, LossWeights(weight))
    expected = (reference.cross_entropy(h @ head.T, labels), reference.cross_entropy(s @ head.T, labels))
    slow = expected[0] + weight * expected[1]
    for ours, truth in ((total, slow), (base, expected[0]), (shadow, expected[1])):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    gradients = zip(torch.autograd.grad(total, (h, s)), torch.autograd.grad(slow, (h, s)), strict=True)
    for ours, truth in gradients:
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_compiled_rows_of_fixed_number_give_the_same_loss():
    head, h, s, labels = example()
    loss = torch.compile(joint_causal_loss, backend="eager", fullgraph=True)
    compiled = loss(linear(head), h, s, labels, LossWeights(0.3, 0.7, 2.0, 0.2))
    eager = joint_causal_loss(linear(head), h, s, labels, LossWeights(0.3, 0.7, 2.0, 0.2))
    assert compiled.draft is eager.draft is None
    torch.testing.assert_close(torch.stack(compiled[:-1]), torch.stack(eager[:-1]), rtol=1e-6, atol=0)


def test_distillation_is_the_weighted_mean_divergence_of_the_attached_model_from_the_shadow():
    head, h, s, labels = example()
    joint = joint_causal_loss(linear(head), h, s, labels, LossWeights(0.0, 0.7, 2.0))
    kept = labels[:, 1:] != -100
    p = torch.log_softmax(h[:, :-1][kept].detach() @ head.T / 2.0, -1)
    q = torch.log_softmax(s[:, :-1][kept] @ head.T / 2.0, -1)
    divergence = 4 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(joint.distillation, divergence)
    torch.testing.assert_close(joint.total, joint.base + 0.7 * divergence)
    torch.testing.assert_close(torch.autograd.grad(joint.total, s)[0], torch.autograd.grad(0.7 * divergence, s)[0])


def top_divergence_of(head: Tensor, h: Tensor, s: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """Mean over the labelled positions of tau^2 KL from the k most likely tokens, made to sum to 1."""
    kept = labels[:, 1:] != -100
    teacher, student = (x[:, :-1][kept] @ head.T / temperature for x in (h.detach(), s))
    logits, tokens = teacher.topk(k)
    p = torch.softmax(logits, -1)
    return temperature**2 * (p * (p.log() - torch.log_softmax(student, -1).gather(1, tokens))).sum(-1).mean()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shadow", [0.0, 0.3])
def test_distillation_may_look_at_the_most_likely_tokens_alone(shadow, temperature, compiled):
    head, h, s, labels = example()
    weights = LossWeights(shadow, 0.7, temperature, 0.2, top_k=3)
    loss = torch.compile(joint_causal_loss, backend="eager", fullgraph=True) if compiled else joint_causal_loss
    joint = loss(linear(head), h, s, labels, weights)
    divergence = top_divergence_of(head, h, s, labels, 3, temperature)
    whole = joint_causal_loss(linear(head), h, s, labels, weights._replace(top_k=None))
    torch.testing.assert_close(joint.distillation, divergence)
    assert abs(whole.distillation - divergence) > 1e-3
    torch.testing.assert_close(joint.total, whole.total + 0.7 * (divergence - whole.distillation))
    expected = torch.autograd.grad(whole.total + 0.7 * (divergence - whole.distillation), (h, s))
    for ours, truth in zip(torch.autograd.grad(joint.total, (h, s)), expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    ("weights", "teacher"),
    [
        (LossWeights(1.0), None),
        (LossWeights(0.3, 0.7, 2.0, 0.2), "states"),
        (LossWeights(0.0, matching=0.2), "states"),
        (LossWeights(0.3, 0.7, 2.0, 0.2, top_k=3), "states"),
        (LossWeights(0.3, 0.7, 2.0, top_k=3), "tokens"),
        (LossWeights(0.0, 0.7, 1.0, top_k=3), "tokens"),
    ],
)
def test_alone_the_shadow_has_the_joint_loss_less_that_of_its_teacher(weights, teacher):
    head, h, s, labels = example()
    given = {None: None, "states": h.detach(), "tokens": top_tokens(linear(head), h, 3, weights.temperature)}[teacher]
    alone = detached_causal_loss(linear(head), s, labels, weights, 7, given)
    joint = joint_causal_loss(linear(head), h, s, labels, weights, 7)
    assert alone.base is None
    torch.testing.assert_close(alone.total, joint.total - joint.base)
    for ours, truth in zip(alone[2:], joint[2:], strict=True):
        assert (ours is None) == (truth is None)
        assert ours is None or torch.isclose(ours, truth)
    gradients = [torch.autograd.grad(loss.total, s)[0] for loss in (alone, joint)]
    torch.testing.assert_close(*gradients)


def test_tokens_that_are_known_need_no_head_of_the_teacher():
    head, h, s, labels = example()
    top = top_tokens(linear(head), h, 3, 1.0)
    calls = []
    counting = Head(lambda x: calls.append(len(x)) or x @ head.T)
    detached_causal_loss(counting, s, labels, LossWeights(0.3, 0.7, top_k=3), None, top)
    assert calls == [int((labels[:, 1:] != -100).sum())] * 2, "cross-entropy and divergence of the student"


def test_matching_is_the_weighted_mean_of_the_relative_squared_distance_and_moves_the_shadow_alone():
    head, h, s, labels = example()
    joint = joint_causal_loss(linear(head), h, s, labels, LossWeights(0.0, matching=0.4))
    kept = labels[:, 1:] != -100
    aim, state = h[:, :-1][kept].detach(), s[:, :-1][kept]
    distance = ((state - aim).norm(dim=-1) ** 2 / aim.norm(dim=-1) ** 2).mean()
    torch.testing.assert_close(joint.matching, distance)
    torch.testing.assert_close(joint.total, joint.base + 0.4 * distance)
    assert joint.shadow is None
    torch.testing.assert_close(
        torch.autograd.grad(joint.total, h, retain_graph=True)[0],
        torch.autograd.grad(joint.base, h, retain_graph=True)[0],
    )
    assert torch.autograd.grad(joint.matching, s)[0].abs().sum() > 0


def test_a_row_of_zeros_to_match_gives_a_number():
    states = torch.zeros(2, 3)
    assert relative_squared_error(states, torch.zeros(2, 3), torch.tensor([True, True])) == 0


def test_all_terms_are_summed_with_their_weights():
    head, h, s, labels = example()
    joint = joint_causal_loss(linear(head), h, s, labels, LossWeights(0.3, 0.7, 2.0, 0.2))
    total = joint.base + 0.3 * joint.shadow + 0.7 * joint.distillation + 0.2 * joint.matching
    torch.testing.assert_close(joint.total, total)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_both_terms_are_divided_by_the_items_of_the_whole_step(kind):
    head, h, s, labels = example()
    whole = joint_causal_loss(linear(head), h, s, labels, LossWeights(0.3))
    count = int((labels[:, 1:] != -100).sum())
    parts = [
        joint_causal_loss(linear(head), h[i : i + 1], s[i : i + 1], labels[i : i + 1], LossWeights(0.3), kind(count))
        for i in range(3)
    ]
    for term in range(3):
        torch.testing.assert_close(sum(part[term] for part in parts), whole[term], rtol=1e-6, atol=1e-6)


def test_without_a_weight_the_shadows_loss_is_not_computed():
    head, h, s, labels = example()
    calls = []

    def count(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ head.T

    total, base, shadow, *_ = joint_causal_loss(Head(count), h, s, labels, LossWeights(0.0))
    assert shadow is None
    assert total is base
    assert calls == [int((labels[:, 1:] != -100).sum())]


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0.0), 7])
def test_without_any_label_loss_and_gradient_are_exactly_zero(items):
    head, h, s, labels = example()
    total, base, shadow, *_ = joint_causal_loss(
        linear(head), h, s, torch.full_like(labels, -100), LossWeights(0.5), items
    )
    assert (total.item(), base.item(), shadow.item()) == (0.0, 0.0, 0.0)
    for gradient in torch.autograd.grad(total, (h, s)):
        assert not gradient.any()


def test_a_label_in_the_first_column_predicts_nothing():
    head, h, s, labels = example()
    labels[:] = -100
    labels[:, 0] = 4
    assert joint_causal_loss(linear(head), h, s, labels, LossWeights(0.5)).total == 0


def test_cross_entropy_of_half_precision_logits_is_computed_in_float32():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(200) % 50
    loss = token_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets))


def test_head_states_reach_the_head_in_the_dtype_of_the_hidden_states():
    seen = []

    def head(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.float() @ torch.ones(WIDTH, VOCABULARY)

    _, h, s, labels = example()
    joint_causal_loss(Head(head), h.to(torch.bfloat16), s.float(), labels, LossWeights(0.5))
    assert seen == [torch.bfloat16, torch.bfloat16]
