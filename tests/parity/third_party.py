"""Our model and a third party's with the same weights, beside equal bases."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import shadow_peft
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.model.formats.peft_shadow import peft_entries, peft_unused
from shadowtune.model.formats.shadow_peft import shadow_peft_entries, shadow_peft_unused
from shadowtune.model.formats.third_party import TensorEntry, to_third_party
from tests.support.bases import BLOCKS, fill, tiny_base
from tests.support.shadows import perturb

RANK, UPDATE_WIDTH, ALPHA, DROPOUT, WEIGHT = 4, 3, 0.7, 0.2, 0.3


@dataclass
class Twins:
    ours: ShadowForCausalLM
    theirs: Any
    named: torch.nn.Module
    """The part of the third party's model that the entries' keys belong to."""
    entries: list[TensorEntry]
    dead: set[str]
    detached_logits: Callable[..., torch.Tensor]
    """Logits of the third party's shadow alone."""


def smaller_model(path: Path) -> str:
    """Save a pretrained causal language model narrower than the base and with the same vocabulary."""
    tiny_base(seed=5, hidden_size=16, intermediate_size=24, num_hidden_layers=2).save_pretrained(path)
    return str(path)


def shadow_peft_twins(pretrained: str | None) -> Twins:
    ours = _ours(pretrained)
    config = shadow_peft.ShadowConfig(
        injection_hidden_size=RANK, gate_hidden_size=UPDATE_WIDTH, alpha=ALPHA, dropout=DROPOUT
    )
    backbone = None
    if pretrained is not None:
        backbone = shadow_peft.AutoModelForCausalLM.from_pretrained(pretrained).model
        backbone.get_input_embeddings().requires_grad_(False)
    inner = shadow_peft.get_shadow_model(tiny_base(), config, shadow_model=backbone)
    theirs = shadow_peft.ShadowForCausalLM(inner, shadow_loss_weight=WEIGHT)
    boundaries = BLOCKS - 1
    entries = shadow_peft_entries(boundaries, ours.shadow.state_dict())

    def detached_logits(**inputs: torch.Tensor) -> torch.Tensor:
        return theirs(**inputs).shadow_logits

    return _copied(Twins(ours, theirs, inner, entries, shadow_peft_unused(boundaries), detached_logits))


def peft_twins(pretrained: str | None) -> Twins:
    ours = _ours(
        pretrained,
        update_norm=False,
        update_bias=True,
        activation="gelu",
        inject_first=True,
        dropout_position="hidden",
        transform_dropout=False,
    )
    config = peft.ShadowConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        update_hidden_size=UPDATE_WIDTH,
        shadow_alpha=ALPHA,
        shadow_dropout=DROPOUT,
        auxiliary_loss_weight=WEIGHT,
        shadow_model=pretrained or "mirror",
    )
    theirs = peft.get_peft_model(tiny_base(), config)
    blocks = [f"model.layers.{block}" for block in range(BLOCKS)]
    entries = peft_entries(blocks, ours.shadow.state_dict())

    def detached_logits(**inputs: torch.Tensor) -> torch.Tensor:
        return theirs.base_model.unload_shadow()(**inputs).logits

    return _copied(Twins(ours, theirs, theirs, entries, peft_unused(blocks), detached_logits))


def _ours(pretrained: str | None, **settings: Any) -> ShadowForCausalLM:
    config = ShadowConfig(
        rank=RANK,
        update_width=UPDATE_WIDTH,
        alpha=ALPHA,
        dropout=DROPOUT,
        shadow_loss_weight=WEIGHT,
        backbone=pretrained or "mirror",
        **settings,
    )
    model = ShadowForCausalLM.from_base(tiny_base(), config)
    fill(model.shadow, seed=3)
    return perturb(model).eval()


def _copied(twins: Twins) -> Twins:
    targets = dict(twins.named.named_parameters())
    with torch.no_grad():
        for name, weight in to_third_party(twins.entries, twins.ours.shadow.state_dict()).items():
            assert targets[name].shape == weight.shape, name
            targets[name].copy_(weight)
    twins.theirs.eval()
    return twins
