import torch
import torch.nn.functional as F

from shadowtune.core.draft_head import DraftHead, draft_loss
from shadowtune.core.kernels.linear_cross_entropy import Head

WIDTH, VOCABULARY = 6, 11


def made(seed=0):
    torch.manual_seed(seed)
    draft_head = DraftHead(WIDTH, 4)
    torch.nn.init.normal_(draft_head.up.weight)
    weight = torch.randn(VOCABULARY, WIDTH)
    return draft_head, weight, Head(lambda x: x @ weight.T, weight)


def by_loops(draft_head, weight, h, s, labels):
    """The same, position by position."""
    losses = []
    for row in range(len(labels)):
        before_h, before_z = torch.zeros(WIDTH), torch.zeros(WIDTH)
        for place in range(labels.shape[1] - 1):
            first = draft_head(s[row, place], before_h)
            second = draft_head(s[row, place], before_z)
            before_h, before_z = h[row, place], first.detach()
            target = labels[row, place + 1]
            if target != -100:
                losses += [F.cross_entropy(each @ weight.T, target) for each in (first, second)]
    return torch.stack(losses).mean()


def test_it_is_the_mean_over_first_and_second_proposals():
    draft_head, weight, head = made()
    h, s = torch.randn(2, 2, 7, WIDTH).unbind()
    labels = torch.randint(VOCABULARY, (2, 7))
    labels[0, :4] = -100
    slow = by_loops(draft_head, weight, h, s, labels)
    expected = torch.autograd.grad(slow, list(draft_head.parameters()))
    fast = draft_loss(head, draft_head, h, s, labels)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, list(draft_head.parameters())), expected)
    torch.testing.assert_close(draft_loss(head, draft_head, h, s, labels, 100), slow * 9 / 100)


def test_no_network_learns_from_it():
    draft_head, _, head = made()
    h, s = (torch.randn(1, 5, WIDTH, requires_grad=True) for _ in range(2))
    draft_loss(head, draft_head, h, s, torch.randint(VOCABULARY, (1, 5))).backward()
    assert h.grad is None
    assert s.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in draft_head.parameters())


def test_it_starts_as_the_shadow_alone():
    draft_head, s = DraftHead(WIDTH, 4), torch.randn(3, WIDTH)
    assert torch.equal(draft_head(s, torch.randn(3, WIDTH)), s)
