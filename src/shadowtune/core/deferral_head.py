r"""The deferral head: two log-odds for each token that the detached shadow generates.

    [a_t, b_t] = W s_t + U x_t + c        W: 2 x d, U: 2 x 3, c: 2
    P(the attached model would generate another token than t) = sigmoid(a_t)
    P(the attached model is right where this answer is wrong)  = sigmoid(mean_t b_t)

s_t is the input of the language model's head, and x_t are the log-probability of the token, the margin between the two
likeliest tokens and the entropy over log V, all before sampling. The means of x_t are the plain confidence signals, so
that the head can rank answers as these do where the states tell nothing.

A linear map of a projected state is a linear map of the state before the projection, so that W folds into a detached
model as its language model's head does. Decoding pays one product with a d x 2 matrix.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

DIFFERS, HELPS = 0, 1
"""Rows of W and U: another token, and a better answer."""
STATISTICS = 3
"""Width of x_t."""


@dataclass(frozen=True)
class DeferralHead:
    """Weights of the head."""

    weight: Tensor
    """W, (2, d), float32."""
    bias: Tensor
    """c, (2,), float32."""
    statistics_weight: Tensor = field(default_factory=lambda: torch.zeros(2, STATISTICS))
    """U, (2, 3), float32."""

    @property
    def width(self) -> int:
        """Width d of the states that it reads."""
        return self.weight.shape[1]

    def logits(self, states: Tensor) -> Tensor:
        """Return W s + c, (..., 2) float32, of states (..., d) of any floating dtype."""
        return states.float() @ self.weight.T.to(states.device) + self.bias.to(states.device)

    def with_statistics(self, logits: Tensor, statistics: Tensor) -> Tensor:
        """Return the log-odds (..., 2): the result of ``logits`` plus U x, of statistics (..., 3)."""
        return logits + statistics.float() @ self.statistics_weight.T.to(statistics.device)

    def folded(self, projection: Tensor) -> "DeferralHead":
        """Return the head of the states before a projection.

        Args:
            projection: (d, d_s); the states of this head are ``projection @ z``.
        """
        return DeferralHead(self.weight @ projection.detach().float().cpu(), self.bias, self.statistics_weight)


def token_statistics(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return x_t, (..., 3) float32, of the chosen tokens (...) by raw logits (..., V) with V > 1."""
    logs = logits.float().log_softmax(-1)
    chosen = logs.gather(-1, tokens[..., None])[..., 0]
    likely = logs.topk(2).values.exp()
    entropy = torch.special.entr(logs.exp()).sum(-1) / torch.tensor(float(logs.shape[-1])).log()
    return torch.stack([chosen, likely[..., 0] - likely[..., 1], entropy], -1)


def standardized_head(weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> DeferralHead:
    """Return the head that equals one of standardized inputs ([s, x] - mean) / spread.

    Args:
        weight: (2, d + 3) of the standardized inputs.
        bias: (2,).
        mean: (2, d + 3), of the inputs that each row was fitted to.
        spread: (2, d + 3), likewise.
    """
    slopes = weight / spread
    bias = (bias - (slopes * mean).sum(1)).float()
    return DeferralHead(slopes[:, :-STATISTICS].float(), bias, slopes[:, -STATISTICS:].float())


def answer_log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds (1,) that the attached model is right where an answer is wrong; logits (T, 2), T > 0."""
    return logits[:, HELPS].mean(0, keepdim=True)


def log_agreement(logits: Tensor) -> Tensor:
    """Return the log-probability () that the attached model would generate none of T tokens otherwise; (T, 2)."""
    return torch.nn.functional.logsigmoid(-logits[:, DIFFERS]).sum()
