import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shadowtune.model.initialization import RIDGE, fit_projection, projection_error

V, D, D_SMALL = 97, 12, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(head, small, weight):
    return (torch.linalg.norm(head @ weight - small) / torch.linalg.norm(small)).item()


@pytest.mark.parametrize("rows", [1, 10, 97, 1000])
def test_it_is_the_least_squares_solution_whatever_the_chunks(rows):
    head, small = random(V, D), random(V, D_SMALL, seed=1)
    fit = fit_projection(head, small, torch.float64, rows)
    expected = torch.linalg.lstsq(head, small).solution
    torch.testing.assert_close(fit.weight, expected, rtol=1e-10, atol=1e-12)
    assert fit.relative_error == pytest.approx(relative(head, small, expected), rel=1e-10)
    assert 0.5 < fit.relative_error < 1
    assert fit.ridge == 0


def test_a_small_head_that_the_base_can_express_is_fitted_exactly():
    head, weight = random(V, D), random(D, D_SMALL, seed=1)
    fit = fit_projection(head, head @ weight, torch.float64)
    torch.testing.assert_close(fit.weight, weight)
    assert fit.relative_error < 1e-12


def test_the_error_is_that_of_the_rounded_projection():
    head = random(V, D, dtype=torch.float32)
    small = (head.double() @ random(D, D_SMALL, seed=1)).float()
    fit = fit_projection(head, small, torch.bfloat16)
    assert fit.weight.dtype == torch.bfloat16
    assert fit.relative_error == pytest.approx(relative(head.double(), small.double(), fit.weight.double()), rel=1e-9)
    assert fit.relative_error > 1e-4


def test_half_precision_heads_are_fitted_in_double_precision():
    head, small = random(V, D, dtype=torch.bfloat16), random(V, D_SMALL, seed=1, dtype=torch.bfloat16)
    fit = fit_projection(head, small, torch.float64, 10)
    torch.testing.assert_close(fit.weight, torch.linalg.lstsq(head.double(), small.double()).solution)


@pytest.mark.parametrize("damage", ["twice", "zero", "all zero", "few rows"])
def test_a_singular_head_takes_a_tiny_ridge(damage):
    head, small = random(V, D), random(V, D_SMALL, seed=1)
    if damage == "twice":
        head[:, 3] = head[:, 7]
    elif damage == "few rows":
        head, small = head[:8], small[:8]
    else:
        head[:, 3 if damage == "zero" else slice(None)] = 0
    fit = fit_projection(head, small, torch.float64)
    best = torch.linalg.lstsq(head, small, driver="gelsd").solution  # the smallest of all solutions
    assert 0 < fit.ridge <= 2 * RIDGE * max(head.square().sum(0).mean().item(), 1)
    torch.testing.assert_close(fit.weight, best, rtol=1e-5, atol=1e-5)
    assert fit.relative_error == pytest.approx(relative(head, small, best), abs=1e-6)


class Rows(TorchDispatchMode):
    """Records the most rows of a float64 tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64 and result.ndim:
            self.most = max(self.most, result.shape[0])
        return result


def test_no_more_than_a_chunk_is_ever_in_double_precision():
    head, small = random(1000, D, dtype=torch.float32), random(1000, D_SMALL, seed=1, dtype=torch.float32)
    with Rows() as seen:
        fit_projection(head, small, rows=50)
    assert seen.most == 50


def test_the_error_without_a_projection_compares_the_heads():
    head, small = random(V, D), random(V, D, seed=1)
    expected = relative(head, small, torch.eye(D, dtype=torch.float64))
    assert projection_error(head, small, None, rows=10) == pytest.approx(expected)
    assert projection_error(head, head, None) == 0
