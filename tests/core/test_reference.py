import torch
import torch.nn.functional as F

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core import reference


def test_norm_and_activations_are_torchs():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = x[0] + 1, x[1]
    torch.testing.assert_close(reference.norm(x, weight, bias), F.layer_norm(x, (7,), weight, bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.activate(x, "silu"), F.silu(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.activate(x, "gelu"), F.gelu(x), rtol=0, atol=1e-12)


def test_cross_entropy_is_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 9, (2, 5), generator=generator)
    labels[0, 2] = labels[1, 0] = labels[1, 4] = -100
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(reference.cross_entropy(logits, labels), expected, rtol=0, atol=1e-12)
    assert reference.cross_entropy(logits, torch.full_like(labels, -100)) == 0


def test_boundary_by_hand():
    config = ShadowConfig(alpha=0.5, update_norm=False, rank=1, update_width=1)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    p = {
        "injection_downs": torch.stack([one[0], 2 * one[0]]),
        "injection_ups": torch.stack([3 * one[0], 5 * one[0]]),
        "transform_downs": one,
        "transform_ups": 2 * one,
        "gate_downs": one,
        "gate_ups": 0 * one,
    }
    h, s = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    hidden, state = reference.boundary(0, h, s, p, config)
    assert (hidden.item(), state.item()) == (2 + 0.5 * (2 - 1) * 1 * 3, 1.0)
    hidden, state = reference.boundary(1, h, s, p, config)
    transformed = 2 * F.silu(h)
    torch.testing.assert_close(state, 0.5 * s + 0.5 * transformed)  # the gate is sigmoid(0)
    torch.testing.assert_close(hidden, h + 0.5 * (h - state) * 2 * 5)


def test_stack_injects_between_blocks_and_on_request_before_the_first():
    visited = []

    def block(h):
        visited.append(h.item())
        return h + 1

    one = torch.ones(3, 1, 1, dtype=torch.float64)
    p = {"injection_downs": one, "injection_ups": one}
    zero = torch.zeros(1, 1, dtype=torch.float64)
    plain = ShadowConfig(rank=1, alpha=1, update=False)
    assert reference.stack([block] * 3, zero, zero - 1, p, plain).item() == 10  # 0 | 1 -> 3 | 4 -> 9
    assert visited == [0, 3, 9]
    visited.clear()
    first = ShadowConfig(rank=1, alpha=1, update=False, inject_first=True)
    assert reference.stack([block] * 3, zero, zero - 1, p, first).item() == 14  # 0 -> 1 | 2 -> 5 | 6 -> 13
    assert visited == [1, 5, 13]
