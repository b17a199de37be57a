"""Method "ensemble": LoRA, a small model that learned the task by itself, and the weight of the latter's logits.

Each part is a run of its own, in the directories ``lora`` and ``shadow`` of the output.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import TrainConfig
from shadowtune.core.head import IGNORE_INDEX, summed_cross_entropy
from shadowtune.model.detached import write_plain
from shadowtune.model.ensemble import SMALL, LogitEnsemble, write_weight
from shadowtune.model.methods import load_trained
from shadowtune.training.mixing import GAMMAS
from shadowtune.training.rows import load_training_rows
from shadowtune.training.shadow_first import alone

LORA = "lora"
"""Run directory of LoRA's own run, in that of the whole."""


def small_model(config: TrainConfig) -> TrainConfig:
    """Return the settings of the small model's run: as the shadow that learns alone before a joint stage."""
    rate = config.optimizer.backbone_learning_rate or config.optimizer.learning_rate
    optimizer = replace(config.optimizer, learning_rate=rate, lora_plus_ratio=None)
    data = replace(config.data, validation=None)
    return alone(replace(config, method="shadow", optimizer=optimizer, data=data))


def adapters(config: TrainConfig) -> TrainConfig:
    """Return the settings of LoRA's run."""
    return replace(
        config,
        method="lora",
        shadow=ShadowConfig(),
        shadow_epochs=0.0,
        data=replace(config.data, validation=None),
        output=str(Path(config.output) / LORA),
    )


def join(config: TrainConfig, directory: Path, report: Callable[[str], None]) -> float:
    """Fit the weight of the small model's logits on the validation rows, and write both models with it.

    Args:
        config: settings of the whole, whose parts have been trained.
        directory: the trained model goes there; it is empty.
        report: called with a line for the user.

    Returns:
        The seconds that fitting took.
    """
    lora, small = adapters(config), small_model(config)
    dtype = vars(torch)[config.base_dtype]
    large = load_trained(Path(lora.output) / "model", "lora", "causal_lm", config.model, dtype=dtype)
    pair: Any = load_trained(Path(small.output) / "model", "shadow", "causal_lm", config.model, dtype=dtype)
    plain = pair.detached()
    del pair
    if torch.cuda.is_available():
        large, plain = large.to("cuda"), plain.to("cuda")
    rows = load_training_rows(config)
    assert rows.validation is not None
    start = time.perf_counter()
    gamma, best, without = fit_weight(
        LogitEnsemble(large, plain, 1.0), rows.validation, rows.collate, config.batch_size
    )
    seconds = time.perf_counter() - start
    report(f"weight of the small model {gamma:g}: loss {best:.4g} on the validation rows, without it {without:.4g}")
    shutil.copytree(Path(lora.output) / "model", directory, dirs_exist_ok=True)
    (directory / SMALL).mkdir()
    write_plain(plain, directory / SMALL)
    write_weight(directory, gamma)
    return seconds


@torch.no_grad()
def fit_weight(
    model: LogitEnsemble,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
) -> tuple[float, float, float]:
    """Choose the weight that the rows' labels are likeliest with, of those that a shadow's interpolation has.

    Args:
        model: the two models.
        rows: encoded validation rows with labels.
        collate: makes a batch of them.
        batch_size: rows at a time.

    Returns:
        The weight, the mean loss with it, and that without the small model.
    """
    model.eval()
    sums, count = torch.zeros(len(GAMMAS), dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch = {name: each.to(model.device) for name, each in collate(list(rows[start : start + batch_size])).items()}
        targets = batch.pop("labels")[:, 1:]
        kept = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        targets = targets[:, kept].reshape(-1)
        large, small = (
            part(**batch, logits_to_keep=kept, use_cache=False).logits.flatten(0, 1)
            for part in (model.large, model.small)
        )
        for index, gamma in enumerate(GAMMAS):
            sums[index] += summed_cross_entropy(large + gamma * small, targets).double().cpu()
        count += int((targets != IGNORE_INDEX).sum())
    losses = (sums / max(count, 1)).tolist()
    best = min(range(len(GAMMAS)), key=losses.__getitem__)
    return GAMMAS[best], losses[best], losses[0]
