r"""The shared prompt: leading tokens that run as in the bare base, so that every adapter has the same keys and values.

An "activated" adapter (as Activated LoRA, https://arxiv.org/abs/2504.12397) injects only behind the shared prompt:

    h'_t = boundary(h_t, s_t)   if t >= n,    else h_t          n: tokens of the shared prompt

Attention is causal, so the hidden states of the first n tokens are the base's in every block. n follows from the tokens
alone: the shared prompt ends with the first occurrence of the marker ``ShadowConfig.injection_after``, the marker
included; without an occurrence n = 0. The first occurrence does not move when a conversation grows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_prompt_length(tokens: Sequence[int], marker: Sequence[int] | None) -> int:
    """Return n of one sequence without padding; 0 without a marker."""
    if marker is None:
        return 0
    wanted, size = list(marker), len(marker)
    starts = (start for start in range(len(tokens) - size + 1) if list(tokens[start : start + size]) == wanted)
    first = next(starts, None)
    return 0 if first is None else first + size


def shared_prompt_lengths(input_ids: Tensor, marker: Sequence[int], attention_mask: Tensor | None = None) -> Tensor:
    """Return n of each sequence, (B,) int64; padding does not count.

    Args:
        input_ids: (B, T).
        marker: token ids that end the shared prompt.
        attention_mask: (B, T), 0 at padding; None if there is none.
    """
    counts = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.long)
    ends = _marker_ends(input_ids, marker, counts.bool())
    first = ends & (ends.long().cumsum(1) == 1)
    return (counts.cumsum(1) * first).sum(1)


def injected_tokens(
    input_ids: Tensor, marker: Sequence[int], attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Return which tokens get injections, (B, T) bool.

    Args:
        input_ids: (B, T), each sequence from its first token on.
        marker: token ids that end the shared prompt.
        attention_mask: (B, T), 0 at padding; None if there is none.
        position_ids: (B, T); sequences that are packed into one row each begin at position 0. None for one per row.
    """
    steps = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = steps == 0 if position_ids is None else (position_ids == 0) | (steps == 0)
    firsts = (steps * begins).cummax(1).values  # index of the first token of each token's own sequence
    ends = _marker_ends(input_ids, marker, None if attention_mask is None else attention_mask.bool())
    ends = ends & (steps - len(marker) + 1 >= firsts)
    before = ends.long().cumsum(1) - ends.long()
    before = before - before.gather(1, firsts)
    totals = torch.zeros_like(input_ids).scatter_add_(1, firsts, ends.long()).gather(1, firsts)
    return (before > 0) | (totals == 0)


def _marker_ends(input_ids: Tensor, marker: Sequence[int], real: Tensor | None) -> Tensor:
    """Whether a token is the last of an occurrence of the marker, (B, T) bool; padding (``real`` 0) never is."""
    ends, size = torch.zeros_like(input_ids, dtype=torch.bool), len(marker)
    if input_ids.shape[1] < size:
        return ends
    matches = (input_ids.unfold(1, size, 1) == torch.tensor(marker, device=input_ids.device)).all(-1)
    if real is not None:
        matches = matches & real.unfold(1, size, 1).all(-1)
    ends[:, size - 1 :] = matches
    return ends
