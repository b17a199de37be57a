r"""Where the projection of a pretrained backbone starts: by least squares between two heads.

A shadow's state s0 = W_proj z feeds the base's head, so the detached logits are W_head W_proj z; the pretrained model's
own are W_small z. They agree for every z exactly when W_head W_proj = W_small. Hence the start is

    W_proj = argmin ||W_head W_proj - W_small||_F,   solved by   (W_head' W_head) W_proj = W_head' W_small.

It is not the fit between the two input embeddings: what comes out of a backbone is written for a head, and only where
both models tie the two is that the same thing. With V tokens, base width d and backbone width d_s, the products (d, d)
and (d, d_s) are summed over chunks of rows in float64; nothing of size V x d is ever copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4096
"""Rows of the two heads that are held in float64 at once."""
RIDGE = 1e-10
"""Added to the diagonal of a singular W_head' W_head, relative to its mean; the answer is then all but the smallest."""
SINGULAR = 1e-13
"""A pivot this small, relative to the largest diagonal entry, is rounding."""


@dataclass(frozen=True)
class ProjectionFit:
    """A fitted projection and how good it is."""

    weight: Tensor
    """W_proj, (d, d_s)."""
    relative_error: float
    """||W_head W_proj - W_small||_F / ||W_small||_F of ``weight`` as it is, rounded to its dtype. 0 is exact."""
    ridge: float
    """What was added to the diagonal: 0 unless the head's columns depend on one another."""


@torch.no_grad()
def fit_projection(
    head: Tensor, small_head: Tensor, dtype: torch.dtype = torch.float32, rows: int = CHUNK
) -> ProjectionFit:
    """Find the projection with which the base's head gives the logits of the small model's.

    Args:
        head: W_head, (V, d), any floating dtype.
        small_head: W_small, (V, d_s), on any device.
        dtype: of the result.
        rows: chunk size.

    Returns:
        The projection, on the head's device.
    """
    width, small_width = head.shape[1], small_head.shape[1]
    device = _exact_device(head)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, small_width, dtype=torch.float64, device=device)
    for a, b in _chunks(head, small_head, rows):
        gram.addmm_(a.T, a)
        cross.addmm_(a.T, b)
    solution, ridge = _solve(gram, cross)
    weight = solution.to(dtype)
    return ProjectionFit(weight.to(head.device), projection_error(head, small_head, weight, rows), ridge)


@torch.no_grad()
def projection_error(head: Tensor, small_head: Tensor, weight: Tensor | None, rows: int = CHUNK) -> float:
    """Return ||W_head W_proj - W_small||_F / ||W_small||_F, summed over the rows themselves in float64.

    Args:
        head: W_head, (V, d).
        small_head: W_small, (V, d_s).
        weight: W_proj, (d, d_s); None for no projection, where d = d_s.
        rows: chunk size.
    """
    wrong, whole = 0.0, 0.0
    for a, b in _chunks(head, small_head, rows):
        made = a if weight is None else a @ weight.to(a)
        wrong += (made - b).square().sum().item()
        whole += b.square().sum().item()
    return (wrong / whole) ** 0.5 if whole else float("nan")


def _exact_device(head: Tensor) -> torch.device:
    return torch.device("cpu") if head.device.type == "mps" else head.device  # Apple's GPUs have no float64


def _chunks(head: Tensor, small_head: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = _exact_device(head)
    for start in range(0, head.shape[0], rows):
        a, b = (matrix[start : start + rows].to(device, torch.float64) for matrix in (head, small_head))
        yield a, b


def _solve(gram: Tensor, cross: Tensor) -> tuple[Tensor, float]:
    """Solve gram X = cross by Cholesky's decomposition; return X and the ridge that it took."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = gram.diagonal()
    ridge = 0.0
    if failed or factor.diagonal().square().min() <= SINGULAR * diagonal.max():
        ridge = RIDGE * (diagonal.mean().item() or 1.0)
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(cross, factor), ridge
