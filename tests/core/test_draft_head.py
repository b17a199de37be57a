import torch
import torch.nn.functional as F

from shadowtune.core.draft_head import DraftHead, draft_loss
from shadowtune.core.kernels.linear_cross_entropy import Head

WIDTH, VOCABULARY = 6, 11


def made(seed=0):
    torch.manual_seed(seed)
    fusion = DraftHead(WIDTH, 4)
    torch.nn.init.normal_(fusion.up.weight)
    weight = torch.randn(VOCABULARY, WIDTH)
    return fusion, weight, Head(lambda x: x @ weight.T, weight)


def by_loops(fusion, weight, h, s, labels):
    """The same, position by position."""
    losses = []
    for row in range(len(labels)):
        before_h, before_z = torch.zeros(WIDTH), torch.zeros(WIDTH)
        for place in range(labels.shape[1] - 1):
            first = fusion(s[row, place], before_h)
            second = fusion(s[row, place], before_z)
            before_h, before_z = h[row, place], first.detach()
            target = labels[row, place + 1]
            if target != -100:
                losses += [F.cross_entropy(each @ weight.T, target) for each in (first, second)]
    return torch.stack(losses).mean()


def test_it_is_the_mean_over_first_and_second_proposals():
    fusion, weight, head = made()
    h, s = torch.randn(2, 2, 7, WIDTH).unbind()
    labels = torch.randint(VOCABULARY, (2, 7))
    labels[0, :4] = -100
    slow = by_loops(fusion, weight, h, s, labels)
    expected = torch.autograd.grad(slow, list(fusion.parameters()))
    fast = draft_loss(head, fusion, h, s, labels)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, list(fusion.parameters())), expected)
    torch.testing.assert_close(draft_loss(head, fusion, h, s, labels, 100), slow * 9 / 100)


def test_no_network_learns_from_it():
    fusion, _, head = made()
    h, s = (torch.randn(1, 5, WIDTH, requires_grad=True) for _ in range(2))
    draft_loss(head, fusion, h, s, torch.randint(VOCABULARY, (1, 5))).backward()
    assert h.grad is None
    assert s.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in fusion.parameters())


def test_it_starts_as_the_shadow_alone():
    fusion, s = DraftHead(WIDTH, 4), torch.randn(3, WIDTH)
    assert torch.equal(fusion(s, torch.randn(3, WIDTH)), s)
