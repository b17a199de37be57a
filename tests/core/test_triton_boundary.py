"""The CUDA kernels, on a GPU where there is one and through Triton's interpreter elsewhere."""

import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries
from tests.support.bases import fill

pytest.importorskip("triton", reason="Triton is for Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def boundaries(kernel, width, dtype, rank=4, update_width=3, **settings):
    made = Boundaries(3, width, ShadowConfig(rank=rank, update_width=update_width, alpha=0.7, **settings))
    fill(made, seed=3)
    made.kernel = kernel
    return made.to(DEVICE, dtype)


def states(rows, width, dtype):
    generator = torch.Generator().manual_seed(1)
    h, s = torch.randn(2, rows, width, dtype=torch.float64, generator=generator)
    return (3 * h + 0.5).to(DEVICE, dtype), s.to(DEVICE, dtype)


def crossed(made, h, s):
    torch.manual_seed(5)
    h, s = h.detach().clone().requires_grad_(), s.detach().clone().requires_grad_()
    out = made(2, h, s)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    gradients = torch.autograd.grad(out, (h, s, *made.parameters()), weights, allow_unused=True)
    return [*out, *(g for g in gradients if g is not None)]


def assert_near(ours, truth, tolerance):
    assert len(ours) == len(truth) == 12
    for index, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        error = (mine.double() - true.double()).norm() / true.double().norm()
        assert error < tolerance, f"tensor {index}: {error}"


@pytest.mark.parametrize(("rows", "width", "rank", "update_width"), [(1, 48, 4, 3), (63, 80, 16, 8), (100, 64, 5, 17)])
def test_outputs_and_every_gradient_equal_the_reference_in_float64(rows, width, rank, update_width):
    sizes = {"rank": rank, "update_width": update_width, "dropout": 0.0}
    truth = crossed(boundaries("reference", width, torch.float64, **sizes), *states(rows, width, torch.float64))
    ours = crossed(boundaries("triton", width, torch.float32, **sizes), *states(rows, width, torch.float32))
    assert_near(ours, truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_near_the_reference(dtype):
    truth = crossed(boundaries("reference", 48, torch.float64, dropout=0.0), *states(33, 48, torch.float64))
    ours = crossed(boundaries("triton", 48, dtype, dropout=0.0), *states(33, 48, dtype))
    assert all(tensor.dtype == dtype for tensor in ours)
    assert_near(ours, truth, 4e-2)


def test_dropout_is_that_of_the_fused_operation():
    fused = crossed(boundaries("fused", 48, torch.float32, dropout=0.4), *states(33, 48, torch.float32))
    ours = crossed(boundaries("triton", 48, torch.float32, dropout=0.4), *states(33, 48, torch.float32))
    assert_near(ours, fused, 2e-6)


def test_rows_may_lie_apart():
    h, s = states(20, 48, torch.float32)
    made = boundaries("triton", 48, torch.float32, dropout=0.0)
    apart = made(1, h.view(10, 2, 48)[:, 1], s.view(10, 2, 48)[:, 1])
    together = made(1, h.view(10, 2, 48)[:, 1].contiguous(), s.view(10, 2, 48)[:, 1].contiguous())
    for ours, truth in zip(apart, together, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_full_depth_sharing_trains_its_scales():
    settings = {"depth_sharing": "full", "dropout": 0.0}
    truth = crossed(boundaries("reference", 48, torch.float64, **settings), *states(9, 48, torch.float64))
    ours = crossed(boundaries("triton", 48, torch.float32, **settings), *states(9, 48, torch.float32))
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)
