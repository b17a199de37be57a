r"""The draft head: improves the shadow's drafts in speculative decoding by the attached model's own hidden states.

At token t the attached model's hidden states of the token before are known from the last pass: h, the input of the
head, and x^1 .. x^m, the inputs of m chosen blocks of the base (``ShadowConfig.draft_layers``). The drafts that begin
there are z_t, z_(t+1), ...:

    z_(t+k) = s0_(t+k) + U (silu(a) * b)
    [a; b]  = D [norm(s0_(t+k)); norm(z_(t+k-1))] + E [norm(h_(t-1)); norm(x^1_(t-1)); ...; norm(x^m_(t-1))]

D: 2d -> 2r, E: (1 + m) d -> 2r, U: r -> d starting at 0, norm(x) = x / rms(x). h_(t-1) stands for z_(t-1), which there
is none of. head(z) proposes the next token. E is computed once for all drafts of a pass. Without ``draft_layers``, as
in release 0.1, there is no E: z_(t+k) = s0_(t+k) + U silu(D [s0_(t+k); z_(t+k-1)]).

The loss runs through as many proposals in a row (``draft_steps``), each from its predecessor, as in decoding
(training-time test of EAGLE-3, https://arxiv.org/abs/2503.01840). It is trained beside the task, from states of both
networks that get no gradient of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shadowtune.core.kernels.linear_cross_entropy import Head
from shadowtune.core.losses import IGNORE_INDEX, linear_cross_entropy, normalize, shift_and_select
from shadowtune.errors import ConfigError


class DraftContext(NamedTuple):
    """What a draft depends on beside s0 of its token."""

    previous: Tensor
    """(..., d), z of the draft before; h of the token before at the first draft."""
    fused: Tensor | None
    """The term of E (..., 2r); None without ``draft_layers``."""

    def later(self) -> "DraftContext":
        """Return the context of drafts (B, T, ...) one position later; zeros come before the first."""
        return DraftContext(_one_later(self.previous), None if self.fused is None else _one_later(self.fused))


class DraftHead(nn.Module):
    """Combines s0 with hidden states of the token before.

    Args:
        width: d.
        rank: r.
        layers: m.
    """

    def __init__(self, width: int, rank: int, layers: int = 0) -> None:
        super().__init__()
        inner = 2 * rank if layers else rank
        self.down = nn.Linear(2 * width, inner, bias=False)
        self.fusion = nn.Linear((1 + layers) * width, inner, bias=False) if layers else None
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def begin(self, features: Tensor) -> DraftContext:
        """Return the context of the first draft, from ``draft_features`` (..., (1 + m) d) of the token before."""
        width = self.up.weight.shape[0]
        features = features.to(self.down.weight.dtype)
        fused = None
        if self.fusion is not None:
            fused = self.fusion(_norm(features.unflatten(-1, (-1, width))).flatten(-2))
        return DraftContext(features[..., :width], fused)

    def forward(self, initial_states: Tensor, context: DraftContext) -> DraftContext:
        """Return the context of the next draft, of which ``previous`` is z (..., d), the input of the head.

        Args:
            initial_states: s0 (..., d).
            context: of this draft.
        """
        s, (previous, fused) = initial_states.to(self.down.weight.dtype), context
        if fused is None:
            inner = F.silu(self.down(torch.cat([s, previous], -1)))
        else:
            gate, value = (self.down(torch.cat([_norm(s), _norm(previous)], -1)) + fused).chunk(2, -1)
            inner = F.silu(gate) * value
        return context._replace(previous=s + self.up(inner))


def _norm(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


class DraftVocabulary:
    """The head of the drafts: the base's, or its rows of the tokens that are drafted.

    Args:
        head: the base's.
        tokens: (K,) that are drafted; None for all, as with a head whose weight is not known.
    """

    def __init__(self, head: Head, tokens: Tensor | None) -> None:
        self.head = head
        self._columns: Tensor | None = None
        self.tokens = None if head.weight is None else tokens
        """The token ids (K,) of the head's columns; None for all in order."""
        if tokens is None or head.weight is None:
            return
        weight, transform = head.weight[tokens], head.logits_transform
        bias = None if head.bias is None else head.bias[tokens]

        def apply(states: Tensor) -> Tensor:
            logits = F.linear(states.to(weight.dtype), weight, bias)
            return logits if transform is None else transform(logits)

        self.head = Head(apply, weight, bias, transform)
        self._columns = torch.full((len(head.weight),), IGNORE_INDEX, device=tokens.device)
        self._columns[tokens] = torch.arange(len(tokens), device=tokens.device)

    def token_ids(self, columns: Tensor) -> Tensor:
        """Return the token ids of columns of the head."""
        return columns if self.tokens is None else self.tokens[columns]

    def labels(self, tokens: Tensor) -> Tensor:
        """Return the columns of tokens; -100 for those that are never drafted, and where there was -100."""
        if self._columns is None:
            return tokens
        columns = self._columns.to(tokens.device)[tokens.clamp(min=0)]
        return columns.masked_fill(tokens == IGNORE_INDEX, IGNORE_INDEX)


def draft_features(hidden_states: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Return [h; x^1; ...; x^m] (..., (1 + m) d) in the dtype of h, from h and each x (..., d)."""
    return torch.cat([hidden_states, *(states.to(hidden_states.dtype) for states in layers)], -1)


def resolve_layers(layers: Sequence[int] | None, blocks: int) -> tuple[int, ...]:
    """Return the indices of the blocks that ``draft_layers`` names, from 0.

    Raises:
        ConfigError: if one is not a block behind the first, or is named twice.
    """
    resolved = tuple(layer + blocks if layer < 0 else layer for layer in layers or ())
    if len(set(resolved)) < len(resolved) or any(not 0 < layer < blocks for layer in resolved):
        raise ConfigError(
            f"draft_layers {list(layers or ())} must be different blocks of the base from 1 to {blocks - 1} (or -1 for "
            f"the last), such as {[max(1, blocks // 8), blocks // 2, blocks - 1]}"
        )
    return resolved


def unrolled_proposals(draft_head: DraftHead, features: Tensor, initial_states: Tensor, steps: int) -> list[Tensor]:
    """Return z (B, T, d) of the first, the second, ... draft in a row of each token; arguments as in ``draft_loss``."""
    context, proposals = draft_head.begin(features), list[Tensor]()
    for _ in range(steps):
        context = draft_head(initial_states, context.later())
        proposals.append(context.previous)
    return proposals


def draft_loss(
    head: Head,
    draft_head: DraftHead,
    features: Tensor,
    initial_states: Tensor,
    labels: Tensor,
    steps: int,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the first ``steps`` proposals of drafts; trains the draft head alone.

    Args:
        head: the base's.
        draft_head: the module.
        features: ``draft_features`` (B, T, (1 + m) d) of the attached model.
        initial_states: s0, (B, T, d).
        labels: (B, T), unshifted.
        steps: proposals in a row.
        num_items_in_batch: labelled tokens of the whole optimizer step; by default those of this call.
    """
    proposals = unrolled_proposals(draft_head, features.detach(), initial_states.detach(), steps)
    targets, *vectors = shift_and_select(labels, *proposals)
    total = features.new_zeros((), dtype=torch.float32)
    for first in range(0, steps, 2):
        pair = [vector.to(features.dtype) for vector in vectors[first : first + 2]]
        sums = linear_cross_entropy(head, pair[0], pair[1] if len(pair) == 2 else None, targets)
        total = total + sums.base + (0 if sums.shadow is None else sums.shadow)
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return normalize(total / steps, count)


def _one_later(states: Tensor) -> Tensor:
    """Shift (B, T, n) states to the next position; zeros come before the first."""
    return F.pad(states[:, :-1], (0, 0, 1, 0))
