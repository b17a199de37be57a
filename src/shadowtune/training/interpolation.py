"""Fit the weight gamma of a second model's logits in z = z_large + gamma z_small, a product of experts.

Within a shadow model z_small are the shadow's own logits (``ShadowConfig.logit_interpolation``); in an ensemble those
of a separately trained small model beside LoRA. The weight is chosen on hold-out data: the small model may have
memorized the training data.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from shadowtune.attach.sharding import gathered_root
from shadowtune.config.training import TrainConfig
from shadowtune.core.boundary import interpolate
from shadowtune.core.losses import IGNORE_INDEX, shift_and_select, summed_cross_entropy
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.detached import write_plain
from shadowtune.model.ensemble import SMALL, LogitEnsemble, write_weight
from shadowtune.model.methods import load_trained
from shadowtune.training.training_data import Collator, load_training_data

GAMMAS = tuple(tenths / 10 for tenths in range(11))
"""Candidate weights."""
Interpolation = tuple[Callable[[float], Tensor], Tensor]
"""Of one batch: gamma -> logits (N, V) at labelled positions, and their targets (N,)."""


class WeightFit(NamedTuple):
    """The weight with the smallest mean cross-entropy."""

    gamma: float
    loss: float
    loss_without: float
    """Loss with gamma = 0."""


@torch.no_grad()
def fit_logit_interpolation(
    model: ShadowForCausalLM, examples: Sequence[dict[str, Any]], collate: Collator, batch_size: int
) -> WeightFit:
    """Set the ``logit_interpolation`` of a shadow model to the weight that fits the labels best, or to None for 0.

    Args:
        model: in mode "attached"; left in eval mode.
        examples: encoded hold-out examples.
        collate: makes a batch of them.
        batch_size: examples per batch.
    """
    model.eval().set_logit_interpolation(None)

    def interpolations() -> Iterator[Interpolation]:
        for batch in _batches(examples, collate, batch_size, model.device):
            labels = batch.pop("labels")
            output, state = model.encode(**batch, use_cache=False, run_shadow=True)
            assert output.last_hidden_state is not None and state.initial is not None
            targets, h, s = shift_and_select(labels, output.last_hidden_state, state.initial)
            yield lambda gamma, h=h, s=s: model.logits_of(interpolate(h, s, gamma)), targets  # type: ignore[misc]

    with gathered_root(model):
        fit = _fit(interpolations())
    model.set_logit_interpolation(fit.gamma or None)
    return fit


@torch.no_grad()
def fit_ensemble_weight(
    model: LogitEnsemble, examples: Sequence[dict[str, Any]], collate: Collator, batch_size: int
) -> WeightFit:
    """Return the weight of the small model's logits that fits the labels best; arguments as above."""
    model.eval()

    def interpolations() -> Iterator[Interpolation]:
        for batch in _batches(examples, collate, batch_size, model.device):
            targets = batch.pop("labels")[:, 1:]
            kept = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
            large, small = (
                part(**batch, logits_to_keep=kept, use_cache=False).logits.flatten(0, 1)
                for part in (model.large, model.small)
            )
            yield lambda gamma, z=large, s=small: z + gamma * s, targets[:, kept].reshape(-1)  # type: ignore[misc]

    return _fit(interpolations())


def join_ensemble(
    config: TrainConfig, runs: tuple[Path, Path], directory: Path, report: Callable[[str], None]
) -> float:
    """Fit the weight of an ensemble on the validation data, and write both of its models.

    Args:
        config: settings of the ensemble.
        runs: finished run directories of the small model and of LoRA.
        directory: empty; the ensemble is written there.
        report: called with a message.

    Returns:
        The seconds that the fit took.
    """
    dtype = vars(torch)[config.base_dtype]
    small_run, lora_run = runs
    large = load_trained(lora_run / "model", "lora", "causal_lm", config.model, dtype=dtype)
    pair: Any = load_trained(small_run / "model", "shadow", "causal_lm", config.model, dtype=dtype)
    small = pair.detached()
    del pair
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        large, small = large.to(device), small.to(device)
    data = load_training_data(config)
    assert data.validation is not None
    start = time.perf_counter()
    fit = fit_ensemble_weight(LogitEnsemble(large, small, 1.0), data.validation, data.collate, config.batch_size)
    seconds = time.perf_counter() - start
    report(
        f"weight of the small model {fit.gamma:g}: loss {fit.loss:.4g} on the validation data, "
        f"{fit.loss_without:.4g} without it"
    )
    shutil.copytree(lora_run / "model", directory, dirs_exist_ok=True)
    (directory / SMALL).mkdir()
    write_plain(small, directory / SMALL)
    write_weight(directory, fit.gamma)
    return seconds


def _batches(
    examples: Sequence[dict[str, Any]], collate: Collator, batch_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(examples), batch_size):
        chosen = range(start, min(start + batch_size, len(examples)))
        batch = send_to_device(collate([examples[index] for index in chosen]), device)
        batch.pop("rows", None)  # see ``with_row_numbers``
        yield batch


def _fit(interpolations: Iterable[Interpolation]) -> WeightFit:
    sums, count = torch.zeros(len(GAMMAS), dtype=torch.float64), 0
    for logits_at, targets in interpolations:
        for index, gamma in enumerate(GAMMAS):
            sums[index] += summed_cross_entropy(logits_at(gamma), targets).double().cpu()
        count += int((targets != IGNORE_INDEX).sum())
    losses = (sums / max(count, 1)).tolist()
    best = min(range(len(GAMMAS)), key=losses.__getitem__)
    return WeightFit(GAMMAS[best], losses[best], losses[0])
