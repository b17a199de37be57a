"""A router that is learned: the probability that asking the cloud would not help, by logistic regression.

confidence = sigmoid(b + w · x),   x = log-odds of the four signals, log(1 + length)
"""

from collections.abc import Sequence

import torch

from shadowtune.config.policy import Weights
from shadowtune.serving.edge.calibration import ALWAYS, Measured
from shadowtune.serving.edge.policies import features, learned_confidence

FOLDS = 5
DECAY = 1e-2
"""Of the squared weights of standardized features; keeps them finite where rows can be told apart without fault."""


def learn(rows: Sequence[Measured]) -> Weights:
    """Fit the weights to rows that both sides have answered; those with the tag teach nothing, they always go."""
    taught = [row for row in rows if not row.tagged]
    if not taught:
        return Weights(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    values = torch.tensor([features(row.signals) for row in taught], dtype=torch.float64)
    kept = torch.tensor([float(row.edge_score >= row.cloud_score) for row in taught], dtype=torch.float64)
    mean, spread = values.mean(0), values.std(0, correction=0)
    spread = torch.where(spread < 1e-9, torch.ones_like(spread), spread)  # a feature that never changes says nothing
    standard = (values - mean) / spread
    weights = torch.zeros(values.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = weights[0] + standard @ weights[1:]
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, kept) + DECAY * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weights.detach()
    slopes = found[1:] / spread
    return Weights(float(found[0] - (slopes * mean).sum()), *slopes.tolist())


def held_out_confidences(rows: Sequence[Measured], folds: int = FOLDS) -> list[float]:
    """Return each row's confidence by weights that were learned without it, as new requests will have it."""
    folds = min(folds, len(rows))
    if folds < 2:
        weights = [learn(rows)]
    else:
        weights = [learn([row for number, row in enumerate(rows) if number % folds != fold]) for fold in range(folds)]
    count = len(weights)
    return [
        ALWAYS if row.tagged else learned_confidence(weights[number % count], row.signals)
        for number, row in enumerate(rows)
    ]
