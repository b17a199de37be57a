r"""The deferral head: two probabilities for each token that the detached shadow generates, from the state it read off.

    [a_t, b_t] = W s_t + c                    W: 2 x d, c: 2, s_t the input of the language model's head
    P(the attached model would generate another token than t) = sigmoid(a_t)
    P(the attached model is right where this answer is wrong)  = sigmoid(mean_t b_t)

A linear map of a projected state is a linear map of the state before the projection, so that the head folds into a
detached model as its language model's head does. Decoding pays one product with a d x 2 matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DIFFERS, HELPS = 0, 1
"""Rows of W: another token, and a better answer."""


@dataclass(frozen=True)
class DeferralHead:
    """Weights of the head."""

    weight: Tensor
    """W, (2, d), float32."""
    bias: Tensor
    """c, (2,), float32."""

    @property
    def width(self) -> int:
        """Width d of the states that it reads."""
        return self.weight.shape[1]

    def logits(self, states: Tensor) -> Tensor:
        """Return (..., 2) log-odds, float32, of states (..., d) of any floating dtype."""
        return states.float() @ self.weight.T.to(states.device) + self.bias.to(states.device)

    def folded(self, projection: Tensor) -> "DeferralHead":
        """Return the head of the states before a projection.

        Args:
            projection: (d, d_s); the states of this head are ``projection @ z``.
        """
        return DeferralHead(self.weight @ projection.detach().float().cpu(), self.bias)


def standardized_head(weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor) -> DeferralHead:
    """Return the head of raw states that equals one of standardized states (s - mean) / spread.

    Args:
        weight: (2, d) of the standardized states.
        bias: (2,).
        mean: (2, d), of the states that each row was fitted to.
        spread: (2, d), likewise.
    """
    slopes = weight / spread
    return DeferralHead(slopes.float(), (bias - (slopes * mean).sum(1)).float())


def answer_log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds (1,) that the attached model is right where an answer is wrong; logits (T, 2), T > 0."""
    return logits[:, HELPS].mean(0, keepdim=True)


def log_agreement(logits: Tensor) -> Tensor:
    """Return the log-probability () that the attached model would generate none of T tokens otherwise; (T, 2)."""
    return torch.nn.functional.logsigmoid(-logits[:, DIFFERS]).sum()
