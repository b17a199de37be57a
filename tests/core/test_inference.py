import pytest
import torch

from shadowtune.core import crossing
from shadowtune.core.inference import inference_boundary
from tests.core.test_fused import boundaries, states


@pytest.fixture
def runs(monkeypatch):
    """Counts the crossings without gradients."""
    seen = []

    def spy(*arguments):
        seen.append(arguments)
        return inference_boundary(*arguments)

    monkeypatch.setattr(crossing, "inference_boundary", spy)
    return seen


@pytest.mark.parametrize("shape", [(1,), (63,), (100,), (2, 5), (1, 3, 4)])
@pytest.mark.parametrize("sharing", ["backbone", "full"])
@torch.no_grad()
def test_without_gradients_it_equals_the_steps_and_leaves_its_inputs_alone(shape, sharing):
    h, s = states(*shape)
    kept = h.clone(), s.clone()
    ours = boundaries("auto", depth_sharing=sharing).eval()(2, h, s)
    truth = boundaries("reference", depth_sharing=sharing).eval()(2, h, s)
    for fast, slow in zip(ours, truth, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    assert torch.equal(h, kept[0])
    assert torch.equal(s, kept[1])


def test_it_runs_where_nothing_wants_a_gradient_or_is_dropped(runs):
    h, s = states(5)
    for training, grad, dropout, count in (
        (False, False, 0.5, 1),
        (True, False, 0.0, 1),
        (True, False, 0.5, 0),
        (False, True, 0.0, 0),
    ):
        runs.clear()
        with torch.set_grad_enabled(grad):
            boundaries("auto", dropout=dropout).train(training)(2, h, s)
        assert len(runs) == count, (training, grad, dropout)


@torch.no_grad()
def test_16_bit_states_beside_float32_parameters_keep_their_dtypes(runs):
    h, s = states(7)
    made = boundaries("auto", torch.float32).eval()
    out = made(1, h.bfloat16(), s.float())
    assert len(runs) == 1
    assert (out[0].dtype, out[1].dtype) == (torch.bfloat16, torch.float32)
    exact = boundaries("reference").eval()(1, h, s)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_strided_and_expanded_states():
    h, s = states(8, 2)
    h, s = h[:, 1], s[:1, 1].expand(8, -1)
    for fast, slow in zip(boundaries("auto").eval()(1, h, s), boundaries("reference").eval()(1, h, s), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
