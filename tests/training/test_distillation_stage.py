import json
from pathlib import Path

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError
from shadowtune.training.run import train
from shadowtune.training.stage_settings import distillation_settings
from shadowtune.training.stages import (
    DistillationStage,
    StageContext,
    own_answers,
    stages,
)
from tests.support.runs import causal_rows, run_config
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

SHADOW = {"variant": "stateless", "rank": 4, "dropout": 0.0, "shadow_loss_weight": 0.0}


def detached_loss(model, examples):
    """Mean loss per answer token of the detached shadow, one example at a time."""
    total, count = 0.0, 0
    mode = model.mode
    model.eval().set_mode("detached")
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100).item()
        count += int((labels[0, 1:] != -100).sum())
    model.set_mode(mode)
    return total / count


def test_the_shadow_learns_the_attached_models_answers_and_nothing_else_changes(tmp_path):
    settings = {"max_steps": 4, "epochs": 1.0, "shadow": ShadowConfig(**SHADOW), "fit_logit_interpolation": False}
    plain = run_config(tmp_path, **settings, output=str(tmp_path / "plain"))
    distilled = run_config(
        tmp_path, **settings, output=str(tmp_path / "distilled"), distillation_epochs=4.0, shadow_learning_rate=1e-2
    )
    assert train(plain, quiet=True).distillation_seconds is None
    summary = train(distilled, quiet=True)
    assert 0 < summary.distillation_seconds < summary.train_seconds
    before, after = (ShadowForCausalLM.from_pretrained(Path(run.output) / "model") for run in (plain, distilled))
    learned = {
        name
        for (name, old), new in zip(before.shadow.state_dict().items(), after.shadow.state_dict().values(), strict=True)
        if not torch.equal(old, new)
    }
    assert learned and not any(name.startswith("boundaries") for name in learned)
    ids = torch.tensor([causal_rows(1)[0]["input_ids"]])
    assert torch.equal(before.eval()(ids).logits, after.eval()(ids).logits)
    answered = own_answers(after, tiny_tokenizer(), causal_rows(8))
    assert detached_loss(after, answered) < detached_loss(before, answered)
    assert (Path(distilled.output) / "distillation" / "metrics.jsonl").exists()
    assert "distillation_seconds" in json.loads((Path(distilled.output) / "summary.json").read_text())


def test_it_comes_after_the_joint_stage_and_before_the_weight_of_its_logits_is_fitted(tmp_path):
    config = run_config(
        tmp_path, shadow=ShadowConfig(**SHADOW), distillation_epochs=2.0, fit_logit_interpolation="auto"
    )
    names = [stage.name for stage in stages(config)]
    assert names[:2] == ["joint", "distillation"]
    assert distillation_settings(config).epochs == 2.0


def test_boundaries_that_read_the_state_are_refused(tmp_path):
    model = perturbed_model()
    context = StageContext(model, causal_rows(2), lambda stage, dataset: None, tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"set shadow\.variant=stateless"):
        DistillationStage().run(context)
    with pytest.raises(ConfigError, match=r"set shadow\.variant=stateless"):
        run_config(tmp_path, distillation_epochs=1.0)


def test_every_parameter_is_as_trainable_as_before_even_if_it_fails():
    model = perturbed_model(**SHADOW)
    model.freeze_unused()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = set()

    def fit(stage, dataset):
        trained.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DistillationStage().run(StageContext(model, causal_rows(2), fit, tokenizer=tiny_tokenizer()))
    assert any("backbone" in name for name in trained) and not any("boundaries" in name for name in trained)
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.mode == "attached"
