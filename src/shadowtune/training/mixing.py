"""How much of the shadow's own logits goes into the attached model's: chosen on validation rows, after training.

Not on training rows: the shadow may know them by heart, which says nothing of how far to trust it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shadowtune.core.boundary import mix
from shadowtune.core.head import IGNORE_INDEX, summed_cross_entropy
from shadowtune.core.losses import labelled_rows
from shadowtune.model.causal_lm import ShadowForCausalLM

GAMMAS = tuple(tenths / 10 for tenths in range(11))
"""What is tried."""


@torch.no_grad()
def fit_head_mixing(
    model: ShadowForCausalLM,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
) -> tuple[float, float]:
    """Give the model the ``head_mixing`` that the rows' labels are likeliest with, None where that is 0.

    Args:
        model: in mode "attached"; left in eval mode.
        rows: encoded validation rows with labels.
        collate: makes a batch of them.
        batch_size: rows at a time.

    Returns:
        The mean loss with it, and that without any.
    """
    model.eval().set_head_mixing(None)
    sums, count = torch.zeros(len(GAMMAS), dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch = {name: each.to(model.device) for name, each in collate(list(rows[start : start + batch_size])).items()}
        labels = batch.pop("labels")
        output, state = model.encode(**batch, use_cache=False, run_shadow=True)
        assert output.last_hidden_state is not None and state.initial is not None
        targets, h, s = labelled_rows(labels, output.last_hidden_state, state.initial)
        for index, gamma in enumerate(GAMMAS):
            sums[index] += summed_cross_entropy(model.logits_of(mix(h, s, gamma)), targets).double().cpu()
        count += int((targets != IGNORE_INDEX).sum())
    losses = (sums / max(count, 1)).tolist()
    best = min(range(len(GAMMAS)), key=losses.__getitem__)
    model.set_head_mixing(GAMMAS[best] or None)
    return losses[best], losses[0]
