import pytest
import torch
import torch.nn.functional as F

from shadowtune.core.draft_head import DraftHead, draft_features, draft_loss, resolve_layers
from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.errors import ConfigError

WIDTH, VOCABULARY = 6, 11


def made(seed=0, layers=0):
    torch.manual_seed(seed)
    draft_head = DraftHead(WIDTH, 4, layers)
    torch.nn.init.normal_(draft_head.up.weight)
    weight = torch.randn(VOCABULARY, WIDTH)
    return draft_head, weight, Head(lambda x: x @ weight.T, weight)


def norm(x):
    return x / torch.sqrt((x**2).sum() / WIDTH + 1e-6)


def fused(p, states):
    """The term of E of the states that a draft begins with; None without ``draft_layers``."""
    return p["fusion.weight"] @ torch.cat([norm(x) for x in states]) if "fusion.weight" in p else None


def z(p, s, before, term):
    """One proposal, written out."""
    if term is None:
        a = p["down.weight"] @ torch.cat([s, before])
        return s + p["up.weight"] @ (a / (1 + torch.exp(-a)))
    a, b = (p["down.weight"] @ torch.cat([norm(s), norm(before)]) + term).chunk(2)
    return s + p["up.weight"] @ (a / (1 + torch.exp(-a)) * b)


def by_loops(draft_head, weight, h, layers, s, labels, steps):
    """The same, draft by draft: proposal k for token t + 1 ends a draft that began k - 1 tokens earlier."""
    losses, p, zero = [], dict(draft_head.named_parameters()), torch.zeros(WIDTH)
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            target = labels[row, place + 1]
            if target == -100:
                continue
            for step in range(steps):
                begin = place - step
                states = [x[row, begin - 1] if begin > 0 else zero for x in (h, *layers)]
                term = fused(p, states)  # 0 where the draft began before the text, as z is there
                proposal = states[0]
                for at in range(max(begin, 0), place + 1):
                    proposal = z(p, s[row, at], proposal, term)
                losses.append(F.cross_entropy(proposal @ weight.T, target))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_is_the_mean_over_proposals_in_a_row(layers, steps):
    draft_head, weight, head = made(layers=layers)
    h, s, *inner = torch.randn(2 + layers, 2, 7, WIDTH).unbind()
    labels = torch.randint(VOCABULARY, (2, 7))
    labels[0, :4] = -100
    slow = by_loops(draft_head, weight, h, inner, s, labels, steps)
    expected = torch.autograd.grad(slow, list(draft_head.parameters()))
    features = draft_features(h, inner)
    fast = draft_loss(head, draft_head, features, s, labels, steps)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, list(draft_head.parameters())), expected)
    torch.testing.assert_close(draft_loss(head, draft_head, features, s, labels, steps, 100), slow * 9 / 100)


def test_no_network_learns_from_it():
    draft_head, _, head = made(layers=1)
    h, x, s = (torch.randn(1, 5, WIDTH, requires_grad=True) for _ in range(3))
    draft_loss(head, draft_head, draft_features(h, [x]), s, torch.randint(VOCABULARY, (1, 5)), 3).backward()
    assert h.grad is None and x.grad is None and s.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in draft_head.parameters())


@pytest.mark.parametrize("layers", [0, 2])
def test_it_starts_as_the_shadow_alone(layers):
    draft_head, s = DraftHead(WIDTH, 4, layers), torch.randn(3, WIDTH)
    assert torch.equal(draft_head(s, draft_head.begin(torch.randn(3, (1 + layers) * WIDTH))).previous, s)


def test_layers_count_from_both_ends_and_must_be_blocks():
    assert resolve_layers(None, 4) == ()
    assert resolve_layers((1, -1), 4) == (1, 3)
    for layers in ((0,), (4,), (3, -1), (-4,)):
        with pytest.raises(ConfigError, match="must be different blocks of the base from 1 to 3"):
            resolve_layers(layers, 4)
