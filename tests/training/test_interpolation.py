import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.data.collate import CausalCollator, PackedCollator
from shadowtune.errors import ConfigError
from shadowtune.evaluation.evaluate import answer_loss
from shadowtune.training.interpolation import GAMMAS, fit_logit_interpolation
from shadowtune.training.run import train
from tests.support.runs import causal_rows, run_config
from tests.support.shadows import perturbed_model


@pytest.mark.parametrize("collate", [CausalCollator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("better", ["attached", "shadow"])
def test_it_takes_what_the_labels_are_likeliest_with(collate, better):
    model, rows = perturbed_model(), causal_rows(7)
    with torch.no_grad():
        if better == "attached":  # nothing of a shadow that says the contrary of what it knows
            model.shadow.backbone.norm.weight.mul_(-3.0)
        else:
            model.base.model.norm.weight.mul_(0.01)
    losses = []
    for gamma in GAMMAS:
        model.set_logit_interpolation(gamma)
        losses.append(answer_loss(model, rows, collate, 3))
    fit = fit_logit_interpolation(model, rows, collate, 3)
    assert model.shadow.config.logit_interpolation == (GAMMAS[losses.index(min(losses))] or None)
    assert (model.shadow.config.logit_interpolation is None) == (better == "attached")
    assert (fit.loss, fit.loss_without) == pytest.approx((min(losses), losses[0]))
    assert answer_loss(model, rows, collate, 3) == pytest.approx(fit.loss)


def test_a_run_chooses_and_saves_it(tmp_path):
    plain = run_config(
        tmp_path, shadow=ShadowConfig(rank=4, update_width=3, dropout=0.0), max_steps=3, shadow_epochs=1.0
    )
    config = replace(plain, fit_logit_interpolation=True, data=replace(plain.data, validation=plain.data.train))
    said = []
    train(config, report=said.append, quiet=True)
    (line,) = [line for line in said if line.startswith("logit_interpolation")]
    model = ShadowForCausalLM.from_pretrained(Path(config.output) / "model")
    gamma = model.shadow.config.logit_interpolation
    assert line.startswith(f"logit_interpolation {gamma or 0:g}: loss ")
    assert (
        json.loads((Path(config.output) / "model" / "config.json").read_text())["shadow"]["logit_interpolation"]
        == gamma
    )


@pytest.mark.parametrize("settings", [{}, {"method": "lora"}])
def test_it_needs_validation_rows_and_a_shadow(tmp_path, settings):
    with pytest.raises(ConfigError, match=r"fit_logit_interpolation chooses .*: set data.validation and method=shadow"):
        run_config(tmp_path, **settings, fit_logit_interpolation=True)
