import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core import boundary
from shadowtune.core.boundary import Boundaries
from shadowtune.core.kernels.fused import inference_boundary
from tests.support.bases import fill

WIDTH = 40


def boundaries(kernel, dtype=torch.float64, **settings):
    made = Boundaries(3, WIDTH, ShadowConfig(rank=4, update_width=3, alpha=0.7, **settings)).to(dtype)
    fill(made, seed=3)
    made.kernel = kernel
    return made


def crossed(made, h, s, index=2, seed=0):
    torch.manual_seed(seed)
    h, s = h.clone().requires_grad_(), s.clone().requires_grad_()
    out = made(index, h, s)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in out]
    inputs = (h, s, *made.parameters())
    gradients = torch.autograd.grad(out, inputs, weights, allow_unused=True)
    return [*out, *(g for g in gradients if g is not None)]


def states(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    h, s = torch.randn(2, *shape, WIDTH, dtype=torch.float64, generator=generator)
    return (3 * h + 0.5).to(dtype), s.to(dtype)


@pytest.mark.parametrize("shape", [(1,), (63,), (100,), (2, 5), (1, 3, 4)])
@pytest.mark.parametrize("sharing", ["backbone", "full"])
def test_fused_equals_step_by_step_with_every_gradient(shape, sharing):
    settings = {"depth_sharing": sharing, "dropout": 0.0}
    pairs = zip(
        crossed(boundaries("fused", **settings), *states(*shape)),
        crossed(boundaries("reference", **settings), *states(*shape)),
        strict=True,
    )
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def runs_fused(made, h, s):
    out = made(1, h, s)[0]
    names = [type(out.grad_fn).__name__, *(type(node).__name__ for node, _ in out.grad_fn.next_functions)]
    return any("FusedBoundary" in name for name in names)


def test_training_on_enough_tokens_takes_the_fused_operation_by_itself():
    assert runs_fused(boundaries("auto"), *states(64))
    assert not runs_fused(boundaries("auto"), *states(63))
    assert not runs_fused(boundaries("reference"), *states(64))
    assert runs_fused(boundaries("fused"), *states(1))


@pytest.mark.parametrize("setting", [{"activation": "gelu"}, {"update_bias": True}, {"update_norm": False}])
def test_other_variants_go_step_by_step(setting):
    assert not runs_fused(boundaries("fused", **setting), *states(64))


def test_dropout_multiplies_both_bottlenecks_and_its_gradient():
    # with the gradient of a loss in float64, compare against finite differences under the same masks
    made = boundaries("fused", dropout=0.4).train()
    h, s = states(5)

    def run(*changed):
        torch.manual_seed(3)
        return made(1, *changed)

    assert torch.autograd.gradcheck(run, (h.requires_grad_(), s.requires_grad_()), atol=1e-6)
    first, again = crossed(made, *states(6), seed=1), crossed(made, *states(6), seed=2)
    assert not torch.equal(first[0], again[0])
    assert torch.equal(crossed(made.eval(), *states(6), seed=1)[0], crossed(made.eval(), *states(6), seed=2)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_lower_precision_stays_near_float64(dtype, tolerance):
    settings = {"dropout": 0.0}
    pairs = zip(
        crossed(boundaries("fused", dtype, **settings), *states(63, dtype=dtype)),
        crossed(boundaries("reference", **settings), *states(63)),
        strict=True,
    )
    for ours, truth in pairs:
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < tolerance


def test_16_bit_states_beside_float32_parameters_keep_their_dtypes():
    h, s = states(7)
    out = boundaries("fused", torch.float32)(1, h.bfloat16(), s.float())
    assert (out[0].dtype, out[1].dtype) == (torch.bfloat16, torch.float32)


def test_strided_and_expanded_states():
    h, s = states(8, 2)
    h, s = h[:, 1], s[:1, 1].expand(8, WIDTH)
    pairs = zip(
        crossed(boundaries("fused", dropout=0.0), h, s),
        crossed(boundaries("reference", dropout=0.0), h, s),
        strict=True,
    )
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


# Without gradients.


@pytest.fixture
def runs(monkeypatch):
    """Counts the calls of the operation for inference."""
    seen = []

    def spy(*arguments):
        seen.append(arguments)
        return inference_boundary(*arguments)

    monkeypatch.setattr(boundary, "inference_boundary", spy)
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
def test_without_gradients_16_bit_states_beside_float32_parameters_keep_their_dtypes(runs):
    h, s = states(7)
    made = boundaries("auto", torch.float32).eval()
    out = made(1, h.bfloat16(), s.float())
    assert len(runs) == 1
    assert (out[0].dtype, out[1].dtype) == (torch.bfloat16, torch.float32)
    exact = boundaries("reference").eval()(1, h, s)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_without_gradients_strided_and_expanded_states():
    h, s = states(8, 2)
    h, s = h[:, 1], s[:1, 1].expand(8, -1)
    for fast, slow in zip(boundaries("auto").eval()(1, h, s), boundaries("reference").eval()(1, h, s), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
