r"""The draft head: improves the shadow's drafts in speculative decoding by the attached model's last hidden state.

At token t the attached model's hidden state of the token before is known from the last pass:

    z_t = s0_t + U silu(D [s0_t; h_(t-1)])            D: 2d -> r, U: r -> d, starting at 0

head(z_t) proposes token t + 1. After the first proposal of a draft h is not known, and z of the token before replaces
it. Trained beside the task, from states of both networks that get no gradient of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import linear_cross_entropy, normalize, shift_and_select


class DraftHead(nn.Module):
    """Combines s0 with the hidden state of the token before.

    Args:
        width: d.
        rank: r.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(2 * width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, initial_states: Tensor, previous_states: Tensor) -> Tensor:
        """Return z (..., d), the input of the head, from s0 (..., d) and h or z (..., d) of the token before."""
        s = initial_states.to(self.down.weight.dtype)
        both = torch.cat([s, previous_states.to(s.dtype)], -1)
        correction: Tensor = self.up(F.silu(self.down(both)))
        return s + correction


def draft_loss(
    head: Head,
    draft_head: DraftHead,
    hidden_states: Tensor,
    initial_states: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of first and second proposals at labelled positions; trains the draft head alone.

    Args:
        head: the base's.
        draft_head: the module.
        hidden_states: h, (B, T, d), the attached model's last hidden states.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
    """
    h, s = hidden_states.detach(), initial_states.detach()
    first = draft_head(s, _one_later(h))
    second = draft_head(s, _one_later(first.detach()))
    targets, first, second = shift_and_select(labels, first, second)
    sums = linear_cross_entropy(head, first.to(h.dtype), second.to(h.dtype), targets)
    assert sums.shadow is not None
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return normalize((sums.base + sums.shadow) / 2, count)


def _one_later(states: Tensor) -> Tensor:
    """Shift (B, T, d) states to the next position; zeros come before the first."""
    return F.pad(states[:, :-1], (0, 0, 1, 0))
